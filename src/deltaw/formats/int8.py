"""INT8: 255 evenly spaced levels -127/127 ... 127/127 of the block's largest magnitude.

Bits a value: 8 + 32 / block, or 8 + 8 / block + 32 / (256 block) with double quantisation. One code is never used: it
repeats 1.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from deltaw.formats.blockwise import BlockwiseWeight
from deltaw.ops.blockwise import Levels


class Int8Weight(BlockwiseWeight):
    """A frozen matrix in uniform 8-bit integers: value = (code - 127) / 127 * absmax."""

    name: ClassVar[str] = "int8"
    tool: ClassVar[str] = "deltaw"
    levels: ClassVar[Levels] = Levels(8, torch.tensor([*range(-127, 128), 127], dtype=torch.float32) / 127.0)
