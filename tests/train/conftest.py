"""A tiny base for the whole session, and a cache that is not the user's."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import save_base

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
