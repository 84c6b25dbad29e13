"""A cache that is not the user's."""

from __future__ import annotations

import pytest

from deltaw.core.fingerprint import set_cache_dir


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    set_cache_dir(folder)
    yield folder
    set_cache_dir(None)
