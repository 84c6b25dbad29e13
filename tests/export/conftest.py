"""Fingerprints of the tests' bases are kept apart."""

from __future__ import annotations

import pytest

from deltaw.core.fingerprint import set_cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)
