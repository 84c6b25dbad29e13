"""A row-wise operation and its backward, a few rows at a time: what it makes on its way is as small as those rows.

    y_i = f(x_i)        dL/dx_i = (df/dx_i)^T dL/dy_i, f computed again

transformers' norms work in float32 and keep or make six matrices of x's size in it; behind the last block, with all
that blocks have kept still alive, that is the step's peak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from deltaw.ops.rounds import rounds

_VALUES = 1 << 18  # of x at a time: 1 MB in float32


def _slices(x: Tensor) -> Iterator[slice]:
    """Equal parts of x's rows."""
    parts = max(1, -(-x.numel() // _VALUES))
    return rounds(len(x), max(1, -(-len(x) // parts)))


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.f = f
        y = torch.empty_like(x)
        for at in _slices(x):
            y[at] = f(x[at])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        for at in _slices(x):
            with torch.enable_grad():
                part = x[at].detach().requires_grad_()
                (dx[at],) = torch.autograd.grad(ctx.f(part), part, grads[0][at])
        return dx, None


def by_rows(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(x) [n, d] of x [n, d], for an f that gives each row from that row alone, in its shape and dtype.

    Nothing that f holds gets a gradient. The result and x's gradient are those of f at the whole x, bit for bit where
    f's own are the same for any number of rows. Compared with it in tests/ops/test_ops_byrows.py.
    """
    y: Tensor = _ByRows.apply(x, f)
    return y
