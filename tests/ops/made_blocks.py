"""What the tests of the quantised ops share: the formats' levels and made matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.formats.fp4 import FP4Weight
from deltaw.formats.int4 import Int4Weight
from deltaw.formats.int8 import Int8Weight
from deltaw.formats.nf4 import NF4Weight
from deltaw.ops.blockwise import Blocks, Levels, Scales, quantise_reference, quantise_scales

LEVELS = {kind.name: kind.levels for kind in (NF4Weight, FP4Weight, Int4Weight, Int8Weight)}
LEVELS["unsorted8"] = Levels(8, torch.rand(256, generator=torch.Generator().manual_seed(3)) * 2 - 1)


def made(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values over five decades from column to column; row 1 is zero where there is one to spare."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values = values * torch.logspace(-3, 2, shape[-1])
    if len(shape) == 2 and shape[0] > 3:
        values[1] = 0
    return values.to(dtype)


def blocks_of(w: Tensor, levels: Levels, block: int, nested: bool) -> Blocks:
    """`w` [out, in] quantised by the reference."""
    codes, absmax = quantise_reference(w, levels, block)
    return Blocks(codes, quantise_scales(absmax) if nested else Scales(absmax), levels, block, (w.shape[0], w.shape[1]))
