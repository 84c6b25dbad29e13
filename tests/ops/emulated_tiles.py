"""A pytest plugin: the library runs with tiles (AMX) computed in memory, whatever the processor has (native/tiles.h).

DELTAW_TEST_LIBRARY=<built with EMULATED> pytest -p emulated_tiles ...
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from deltaw.ops.native import library

EMULATED = ("-DDELTAW_EMULATED_TILES", "-O1")


@cache
def _loaded() -> library.Native:
    native, problem = library.open_library(Path(os.environ["DELTAW_TEST_LIBRARY"]))
    assert native is not None, problem
    return native


def pytest_configure() -> None:
    library.loaded = _loaded
