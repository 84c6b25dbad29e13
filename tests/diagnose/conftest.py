"""Tiny bases for the session, and a cache that is not the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from diagnosed_runs import rows, run, save_base

from deltaw.core.fingerprint import set_cache_dir


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    set_cache_dir(folder)
    yield folder
    set_cache_dir(None)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def healthy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns its rows: nothing is wrong with it."""
    data = rows(48, 6)
    return run(base, tmp_path_factory.mktemp("runs") / "healthy", data=data, valid=data[:8])
