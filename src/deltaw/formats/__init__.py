"""One file per weight format. `FORMATS` is the registry; those of `QUANTISED` keep 4 or 8 bits a value."""

from __future__ import annotations

from deltaw.formats.blockwise import BLOCKS, BlockwiseWeight, check_block
from deltaw.formats.dense import DenseWeight
from deltaw.formats.fp4 import FP4Weight
from deltaw.formats.int4 import Int4Weight
from deltaw.formats.int8 import Int8Weight
from deltaw.formats.nf4 import NF4Weight

FORMATS: dict[str, type[DenseWeight] | type[BlockwiseWeight]] = {
    "dense": DenseWeight,
    "nf4": NF4Weight,
    "fp4": FP4Weight,
    "int4": Int4Weight,
    "int8": Int8Weight,
}
QUANTISED: dict[str, type[BlockwiseWeight]] = {n: f for n, f in FORMATS.items() if issubclass(f, BlockwiseWeight)}

__all__ = ["BLOCKS", "FORMATS", "QUANTISED", "BlockwiseWeight", "DenseWeight", "check_block"]
