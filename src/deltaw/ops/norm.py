"""Norms of the rows of a changed matrix W + s B A, without making that matrix.

W [out, in] frozen    A [r, in], B [out, r]    s a number
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.core.weight import Weight

_WIDENED = 1 << 22  # values of W in float32 at a time


def row_squares(w: Tensor) -> Tensor:
    """The sum of squares of each row of `w` [out, in]: [out], float64 for float64, else float32."""
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    step = max(1, _WIDENED // max(1, w.shape[1]))
    norms = [torch.linalg.vector_norm(part, dim=1, dtype=wide) for part in w.split(step)]
    return torch.cat(norms).square_()


@torch.no_grad()
def row_norms(weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The norm of each row of W + s B A: [out], float64 for a float64 base, else float32. No gradient.

        |W_o + s B_o A|^2 = |W_o|^2 + 2 s (W A^T)_o . B_o + s^2 (B_o A A^T) . B_o

    |W_o|^2 is kept by the weight, so a call costs one product with r rows. Where W and the change cancel, the sum is no
    more exact than |W_o|^2 is: it is held above that rounding, and above zero, so that a quotient by it is finite.
    Compared with the norm of the whole matrix in float64 in tests/ops/test_ops_norm.py.
    """
    squares = weight.row_squares()
    wide = squares.dtype
    a, b = A.to(squares.device, wide), B.to(squares.device, wide)
    cross = weight.mul(a if wide == torch.float64 else a.to(weight.dtype)).T.to(wide)
    change = torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale * scale)
    limits = torch.finfo(wide)
    least = squares * limits.eps + limits.tiny
    return torch.maximum(squares + (change * b).sum(1), least).sqrt_()
