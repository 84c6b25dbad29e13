"""Cross-entropy from hidden states: the logits are made, judged and turned into a gradient a few rows at a time.

    h [n, d], W [V, d] frozen, b [V] or None, targets [n];  z = h W^T + b
    L = sum_i (logsumexp(z_i) - z_i[target_i])
    dL/dz_i = softmax(z_i) - onehot(target_i),   dL/dh = dL/dz W

The gradient is made in the forward, so one chunk of logits is all that ever exists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.weight import Weight
from deltaw.ops.arena import Arena
from deltaw.ops.loss import cross_entropy_
from deltaw.ops.rounds import rounds
from deltaw.ops.wide import Band, Frozen, Term, products

_CHUNK = 64 << 20  # bytes of logits at a time: fewer rows make the products slower, more gain nothing


def head_loss_reference(h: Tensor, weight: Weight, bias: Tensor | None, targets: Tensor) -> Tensor:
    """The slow, plain form: what `head_loss` must equal, the gradient included."""
    logits = weight.mul(h, bias)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), targets, reduction="sum")


def _chunk(h: Tensor, weight: Weight, bias: Tensor | None, targets: Tensor, arena: Arena, dh: Tensor | None) -> Tensor:
    """The summed loss of a few rows; fills their dh."""
    with arena.lock, arena.scratch():
        logits = arena.borrow(len(h), weight.out_features, like=h, apart=True)
        products([Band(logits, [Term(h, Frozen(weight))], bias)], arena)
        loss = cross_entropy_(logits, targets).sum()
        if dh is not None:
            products([Band(dh, [Term(logits, Frozen(weight, back=True))])], arena)
    return loss


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Weight, bias: Tensor | None, targets: Tensor, arena: Arena, wanted: bool
    ) -> Tensor:
        n, vocab = len(h), weight.out_features
        dh = torch.empty_like(h) if wanted else None
        total = h.new_zeros((), dtype=torch.promote_types(h.dtype, torch.float32))
        chunks = max(1, -(-n * vocab * h.element_size() // _CHUNK))
        rows = max(1, -(-n // chunks))
        for at in rounds(n, rows):
            total += _chunk(h[at], weight, bias, targets[at], arena, None if dh is None else dh[at])
        ctx.dh = dh
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dh = ctx.dh * grads[0]  # the scalar stays float32
        return dh, None, None, None, None, None


def head_loss(h: Tensor, weight: Weight, bias: Tensor | None, targets: Tensor, arena: Arena) -> Tensor:
    """Summed negative log-likelihood of `targets` [n] int64 behind a frozen head at `h` [n, d]: a float32 scalar.

    Compared with `head_loss_reference` in tests/ops/test_ops_head.py.
    """
    wanted = torch.is_grad_enabled() and h.requires_grad
    loss: Tensor = _HeadLoss.apply(h, weight, bias, targets, arena, wanted)
    return loss
