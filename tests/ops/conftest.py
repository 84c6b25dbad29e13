"""Every path of this machine, in turn."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deltaw.ops import native


@pytest.fixture(params=native.paths())
def any_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each path that this machine can run, in turn: "reference" alone where there is no compiled library."""
    with native.forced(request.param):
        yield request.param
