"""Products whose result is as thin as an adapter's rank: u = x A^T, and the backward of what LoRA adds.

    g [n, cols], factor [cols, rank], u [n, rank]        h = scale g factor    sums = u^T g

They are bound by memory, not by arithmetic: the compiled form (native/thin.h, bfloat16) reads each wide matrix once.
The plain form is two products of PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.ops.native import thin_calls

THIN = 48
"""Ranks up to which the compiled form is the faster one (docs/log.md); beyond, a product is not thin."""


def thin_back(
    g: Tensor, factor: Tensor | None, u: Tensor | None, *, scale: float = 1.0, out: Tensor | None = None
) -> Tensor | None:
    """Fill `out` [n, rank] with scale g factor, where it is given; returns u^T g [rank, cols] where u is given.

    The sums are float32 (float64 of float64) and unscaled.
    """
    side = u if out is None else out
    if side is not None and _native(g, side) and (out is None or g.shape[1] % 2 == 0):
        chunks = thin_calls.back(g, factor, u, scale, out)
        return None if chunks is None else chunks.sum(0)
    if out is not None and factor is not None:
        torch.mm(g, factor if scale == 1 else factor * scale, out=out)
    return None if u is None else (u.T @ g).to(torch.promote_types(g.dtype, torch.float32))


def _native(wide: Tensor, thin: Tensor) -> bool:
    known = wide.dtype == thin.dtype == torch.bfloat16 and wide.is_cpu and thin.shape[1] <= THIN
    return known and thin_calls.available()
