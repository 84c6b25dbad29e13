"""y = g (t - b) + b: a gain on the rows of a linear map, whose bias it leaves alone.

t [..., out] output of the map, b [out] its bias or None, g [out] the gain in any float dtype
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gained_reference(t: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """The slow, plain form: what `gained` must equal, gradients included."""
    g = gain.to(t.dtype)
    return g * t if bias is None else g * (t - bias.to(t.dtype)) + bias.to(t.dtype)


class _Gained(torch.autograd.Function):
    """Derivation. With d = g - 1, y = t + d (t - b) and G = dL/dy (rows are tokens):

        dL/dt = G + d G        dL/dg = the rows of G (t - b) summed        dL/db = - d (the rows of G summed)

    d, and not g, is rounded to the compute dtype: bfloat16 has no number between 1 and 1.0078, and a gain of 1 gives t
    bit for bit. Each of y and dL/dt is one pass. Only t is saved; y is not, since the model may write into it.
    """

    @staticmethod
    def forward(ctx: Any, t: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
        d = (gain - 1).to(t.dtype)
        y = torch.addcmul(t, t, d)
        if bias is not None:
            y -= d * bias.to(t.dtype)
        ctx.save_for_backward(t if ctx.needs_input_grad[1] else None, d, bias)
        ctx.gain_dtype = gain.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        t, d, bias = ctx.saved_tensors
        need_t, need_gain, need_bias = ctx.needs_input_grad
        dt = torch.addcmul(g, g, d) if need_t else None
        dgain = dbias = None
        if need_gain:  # where b is taken off again the sum keeps its digits, which is slower
            dgain = _sum(g * t, t.dtype if bias is None else ctx.gain_dtype).to(ctx.gain_dtype)
        if bias is not None and (need_gain or need_bias):
            summed = _sum(g, ctx.gain_dtype)
            dgain = None if dgain is None else dgain - summed * bias
            dbias = (-summed * d).to(bias.dtype) if need_bias else None
        return dt, dgain, dbias


def _sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows of x [..., out] summed in `dtype`."""
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=dtype)


def gained(t: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """g (t - b) + b: [..., out] -> [..., out].

    Compared with `gained_reference` in tests/ops/test_ops_rowgain.py, gradients by gradcheck in float64.
    """
    y: Tensor = _Gained.apply(t, gain, bias)
    return y
