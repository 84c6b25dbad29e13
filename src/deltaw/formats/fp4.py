"""FP4: a sign, two bits of exponent, one of mantissa, as bitsandbytes defines it.

The code is the bit pattern, so the table is not sorted; its largest magnitude, 12, becomes 1. Bits a value as NF4's.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from deltaw.formats.blockwise import BlockwiseWeight
from deltaw.ops.blockwise import Levels

_MAGNITUDES = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]


class FP4Weight(BlockwiseWeight):
    """A frozen matrix in FP4, bytes as bitsandbytes has them."""

    name: ClassVar[str] = "fp4"
    tool: ClassVar[str] = "bitsandbytes"
    levels: ClassVar[Levels] = Levels(
        4, torch.tensor([*_MAGNITUDES, *(0.0 - m for m in _MAGNITUDES)], dtype=torch.float32) / 12.0
    )
