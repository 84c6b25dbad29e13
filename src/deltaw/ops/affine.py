"""Apply an Affine (core/affine.py has the formula) at an input, under autograd."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.weight import Weight
from deltaw.ops.lowrank import lowrank_linear
from deltaw.ops.rowgain import gained


def apply(
    affine: Affine,
    x: Tensor,
    weight: Weight,
    base_bias: Tensor | None = None,
    dropped: Tensor | None = None,
) -> Tensor:
    """The changed map at `x`: [..., in] -> [..., out].

    dropped  x after dropout, the input of A in training; None: x itself
    """
    dtype = x.dtype
    x_in = x if affine.in_gain is None else gained(x, affine.in_gain)
    bias = base_bias if affine.bias is None else affine.bias.to(dtype)
    if affine.A is None or affine.B is None:
        y = weight.mul(x_in, bias)
    else:
        branch = x if dropped is None else dropped
        y = lowrank_linear(x_in, weight, affine.A, affine.B, affine.scale, branch, bias)
    return y if affine.out_gain is None else gained(y, affine.out_gain, bias)


def delta(
    affine: Affine, x: Tensor, weight: Weight, base: Tensor, base_bias: Tensor | None, dropped: Tensor | None = None
) -> Tensor:
    """What the change adds to the base's own output `base` [..., out] at `x` [..., in]; `dropped` as in `apply`."""
    if not affine.is_low_rank_only:
        return apply(affine, x, weight, base_bias, dropped) - base
    d = base.new_zeros(())
    if affine.A is not None and affine.B is not None:
        d = affine.scale * F.linear(
            F.linear(x if dropped is None else dropped, affine.A.to(x.dtype)), affine.B.to(x.dtype)
        )
    if affine.bias is not None:
        d = d + (affine.bias if base_bias is None else affine.bias - base_bias).to(x.dtype)
    return d


def change_rows_(y: Tensor, affine: Affine, x: Tensor, base_bias: Tensor | None) -> None:
    """Change the base's output y [n, out] in place into the changed map's at x [n, in], without the map's product.

    y  W (in_gain * x) + the base's bias: a gain on inputs is in it already. Not for training.
    """
    if affine.A is not None and affine.B is not None:
        y.addmm_(x @ affine.A.to(x.dtype).T, affine.B.to(x.dtype).T, alpha=affine.scale)
    bias = base_bias
    if affine.bias is not None:
        bias = affine.bias.to(y.dtype)
        y += bias if base_bias is None else bias - base_bias
    if affine.out_gain is not None:
        y.copy_(gained(y, affine.out_gain, bias))


def apply_columns(affine: Affine, ids: Tensor, weight: Weight) -> Tensor:
    """The changed map at one-hot inputs, as an embedding looks up: ids [...] -> [..., out].

    A row that is looked up twice gets the sum of both gradients.
    """
    y = weight.columns(ids)
    if affine.in_gain is not None:
        y = y * affine.in_gain[ids].unsqueeze(-1).to(y.dtype)
    if affine.A is not None and affine.B is not None:
        a = F.embedding(ids, affine.A.T).to(y.dtype)
        y = y + affine.scale * (a @ affine.B.T.to(y.dtype))
    if affine.out_gain is not None:
        y = gained(y, affine.out_gain)
    return y if affine.bias is None else y + affine.bias.to(y.dtype)
