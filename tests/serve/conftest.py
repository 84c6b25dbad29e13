"""One server for the tests that change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from made_servers import ADMIN, Made, Running, make_files, running

from deltaw.serve.keys import hash_key
from deltaw.serve.settings import ServerSettings


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_files(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def http(made: Made) -> Iterator[Running]:
    """Open to all, with an admin key."""
    settings = ServerSettings(admin_sha256=hash_key(ADMIN), adapter_roots=(made.loose,), header_s=0.5, body_s=0.5)
    with running(made, settings) as server:
        yield server
