"""INT4: fifteen evenly spaced levels -7/7 ... 7/7 of the block's largest magnitude. Bits a value as NF4's.

Zero is a level and the levels are symmetric, so one code of sixteen is never used: it repeats 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from deltaw.formats.blockwise import BlockwiseWeight
from deltaw.ops.blockwise import Levels


class Int4Weight(BlockwiseWeight):
    """A frozen matrix in uniform 4-bit integers: value = (code - 7) / 7 * absmax."""

    name: ClassVar[str] = "int4"
    tool: ClassVar[str] = "deltaw"
    levels: ClassVar[Levels] = Levels(4, torch.tensor([*range(-7, 8), 7], dtype=torch.float32) / 7.0)
