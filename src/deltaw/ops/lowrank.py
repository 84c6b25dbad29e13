"""y = x W^T + scale * (z A^T) B^T + bias, with a frozen W: the product every low-rank method needs.

x [..., in] input of W      z [..., in] input of A (x itself, or x after dropout)
W [out, in] frozen          A [r, in], B [out, r], bias [out] or None: trained, any float dtype
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.weight import Weight


def lowrank_linear_reference(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scale: float,
    z: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The slow, plain form: what `lowrank_linear` must equal, gradients included."""
    z = x if z is None else z
    u = F.linear(z, A.to(x.dtype))
    y = weight.mul(x) + scale * F.linear(u, B.to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)


class _LowRankLinear(torch.autograd.Function):
    """Derivation. With u = z A^T, y = x W^T + s u B^T and g = dL/dy (rows are tokens):

        dL/dx = g W            dL/du = s g B =: h        dL/dz = h A
        dL/dB = s g^T u        dL/dA = h^T z             dL/dbias = the rows of g summed

    When z is x, both input gradients add up in one buffer. Only x (or z) and u are saved, in the compute
    dtype, and the two products with B and A accumulate into the large result without a temporary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        weight: Any,
        scale: float,
    ) -> Tensor:
        dtype = x.dtype
        a, b = A.to(dtype), B.to(dtype)
        source = (x if z is None else z).reshape(-1, x.shape[-1])
        u = source @ a.T
        y: Tensor = weight.mul(x, None if bias is None else bias.to(dtype))
        y.view(-1, y.shape[-1]).addmm_(u, b.T, alpha=scale)
        ctx.save_for_backward(source, u, A, B)
        ctx.weight, ctx.scale, ctx.same, ctx.shape = weight, scale, z is None, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        source, u, A, B = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        h = (flat @ B.to(g.dtype)).mul_(ctx.scale)
        need_x, need_z, need_a, need_b, need_bias = ctx.needs_input_grad[:5]
        dx = dz = da = db = dbias = None
        if need_x:
            dx = ctx.weight.mul_t(flat)
            if ctx.same:
                dx.addmm_(h, A.to(g.dtype))
            dx = dx.view(ctx.shape)
        if need_z and not ctx.same:
            dz = (h @ A.to(g.dtype)).view(ctx.shape)
        if need_a:
            da = (h.T @ source).to(A.dtype)
        if need_b:
            db = (flat.T @ u).mul_(ctx.scale).to(B.dtype)
        if need_bias:
            dbias = flat.sum(0, dtype=ctx.bias_dtype)
        return dx, dz, da, db, dbias, None, None


def lowrank_linear(
    x: Tensor,
    weight: Weight,
    A: Tensor,
    B: Tensor,
    scale: float,
    z: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """x W^T + scale * (z A^T) B^T + bias: [..., in] -> [..., out]; z defaults to x. W gets no gradient.

    Source: LoRA (arXiv:2106.09685), equation 3. Compared with `lowrank_linear_reference` in
    tests/ops/test_ops_lowrank.py, gradients by gradcheck in float64.
    """
    if z is x:
        z = None
    y: Tensor = _LowRankLinear.apply(x, z, A, B, bias, weight, float(scale))
    return y
