"""Rotary positions, in place: halves of the first features of each head are turned against each other.

Source: RoFormer (arXiv:2104.09864), in the half-split layout of transformers' `rotate_half`. Not an autograd operation:
fused blocks call it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native import elementwise_calls as calls


def rotate_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Turn the first R features of x [T, H, D] in place, in float32, rounded once; the rest stays.

        y1 = x1 cos1 - x2 sin1        y2 = x2 cos2 + x1 sin2        1, 2: the halves of R

    x          strides (any, D, 1): a slice of a wider buffer will do
    cos, sin   float32 [T, R], contiguous, R <= D even
    back       the transposed map, which takes dy to dx:  dx1 = g1 cos1 + g2 sin2,  dx2 = g2 cos2 - g1 sin1

    Raises ShapeError for other shapes or strides.
    """
    if not calls.suits(x):
        rotate_reference_(x, cos, sin, back=back)
    elif not x.is_meta:
        calls.rotate(x, cos, sin, back)


def rotate_reference_(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """The slow, plain form of `rotate_`."""
    n = cos.shape[-1]
    if x.ndim != 3 or n > x.shape[-1] or n % 2 or cos.shape != (x.shape[0], n) or sin.shape != cos.shape:
        raise ShapeError(f"{list(x.shape)} is not rotated by cos {list(cos.shape)} and sin {list(sin.shape)}.")
    wide = torch.promote_types(x.dtype, torch.float32)
    x1, x2 = x[..., :n].to(wide).chunk(2, -1)
    cos1, cos2 = cos[:, None].to(wide).chunk(2, -1)
    sin1, sin2 = sin[:, None].to(wide).chunk(2, -1)
    if back:
        y1, y2 = x1 * cos1 + x2 * sin2, x2 * cos2 - x1 * sin1
    else:
        y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2
    x[..., : n // 2] = y1.to(x.dtype)
    x[..., n // 2 : n] = y2.to(x.dtype)
