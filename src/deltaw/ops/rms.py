"""RMSNorm over the last dimension, forward and backward, on rows that may be slices of wider buffers.

    y = x rstd w        rstd = 1 / sqrt(mean(x^2) + eps)        w = weight, or 1 + weight (Gemma)

Source: Root Mean Square Layer Normalization (arXiv:1910.07467). Not autograd operations: fused blocks call them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.ops.native import elementwise_calls as calls


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, one_plus: bool = False, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y in x's dtype, computed in float32 and rounded once, and rstd in float32.

    x        [n, d], or [n, h, d] with strides (any, d, 1)
    weight   [d] of any float dtype; None: ones
    out      where y is written, shaped and laid out as x may be (or x itself); None: a new contiguous tensor
    returns  y, and rstd [n] or [n, h] (float64 for float64)

    Raises ShapeError for other shapes or strides.
    """
    if not calls.suits(x, out):
        y, rstd = rms_norm_reference(x, weight, eps, one_plus=one_plus)
        return (y if out is None else out.copy_(y)), rstd
    y = x.new_empty(x.shape) if out is None else out
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if not x.is_meta:
        calls.rms_norm(x, _gain(weight, torch.float32, one_plus), eps, y, rstd)
    return y, rstd


def rms_norm_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    *,
    one_plus: bool = False,
    add: Tensor | None = None,
    need_weight: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, plus `add` where it is given, and that of the weight if it is needed.

        dx = rstd (g w - x_hat mean(g w x_hat)) + add        dweight = the rows of g x_hat summed        x_hat = x rstd

    g, x     [n, d] or [n, h, d], laid out as in `rms_norm`; rstd as it returned
    add      as dx; it may be `out`, which accumulates
    out      where dx is written, laid out as x may be; g, x or add itself will do. None: a new contiguous tensor
    returns  dx in x's dtype, rounded once; dweight [d] float32 (float64 for float64) or None. Its sum goes by 64 rows.

    Raises ShapeError for other shapes or strides.
    """
    if not calls.suits(x, g, add, out):
        dx, dweight = rms_norm_backward_reference(g, x, weight, rstd, one_plus=one_plus, add=add)
        return (dx if out is None else out.copy_(dx)), (dweight if need_weight else None)
    dx = x.new_empty(x.shape) if out is None else out
    chunks = -(-rstd.numel() // calls.CHUNK)
    partial = x.new_empty((chunks, x.shape[-1]), dtype=torch.float32) if need_weight else None
    if not x.is_meta:
        calls.rms_norm_backward(g, x, _gain(weight, torch.float32, one_plus), rstd, add, dx, partial)
    return dx, None if partial is None else partial.sum(0)


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, *, one_plus: bool = False
) -> tuple[Tensor, Tensor]:
    """The slow, plain form of `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = wide.square().mean(-1).add(eps).rsqrt()
    y = wide * rstd[..., None]
    gain = _gain(weight, wide.dtype, one_plus)
    return (y if gain is None else y * gain).to(x.dtype), rstd


def rms_norm_backward_reference(
    g: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, *, one_plus: bool = False, add: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The slow, plain form of `rms_norm_backward`; it always gives both gradients."""
    wide = rstd.dtype
    hat, g = x.to(wide) * rstd[..., None], g.to(wide)
    gain = _gain(weight, wide, one_plus)
    inner = g if gain is None else g * gain
    dx = rstd[..., None] * (inner - hat * (inner * hat).mean(-1, keepdim=True))
    dx = dx if add is None else dx + add.to(wide)
    return dx.to(x.dtype), (g * hat).reshape(-1, x.shape[-1]).sum(0)


def _gain(weight: Tensor | None, dtype: torch.dtype, one_plus: bool) -> Tensor | None:
    if weight is None:
        return None
    gain = weight.to(dtype).contiguous()
    return gain + 1 if one_plus else gain
