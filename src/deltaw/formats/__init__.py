"""One file per weight format. `FORMATS` is the registry."""

from __future__ import annotations

from deltaw.formats.dense import DenseWeight

FORMATS = {"dense": DenseWeight}

__all__ = ["FORMATS", "DenseWeight"]
