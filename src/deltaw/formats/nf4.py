"""NF4: sixteen quantiles of a normal distribution (QLoRA, arXiv:2305.14314, section 3 and appendix E).

Bits a value: 4 + 32 / block, or 4 + 8 / block + 32 / (256 block) with double quantisation: 4.5 and 4.127 at 64.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from deltaw.formats.blockwise import BlockwiseWeight
from deltaw.ops.blockwise import Levels


class NF4Weight(BlockwiseWeight):
    """A frozen matrix in NF4, bytes as bitsandbytes has them."""

    name: ClassVar[str] = "nf4"
    tool: ClassVar[str] = "bitsandbytes"
    levels: ClassVar[Levels] = Levels(
        4,
        torch.tensor([
            -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
            0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
            0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
        ], dtype=torch.float32),
    )  # fmt: skip
