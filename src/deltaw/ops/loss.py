"""Cross-entropy over rows, with the gradient made in the forward.

    logits [n, V], targets [n]  ->  logsumexp(logits_i) - logits_i[target_i], float32, by row or summed

The kernel reads a row three times from the second-level cache; in the reference one chunk of rows at a time is held in
float32. Compared with torch.nn.functional.cross_entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaw.ops.native import elementwise_calls as calls
from deltaw.ops.rounds import rounds

_CHUNK_VALUES = 4_000_000  # logits upcast at a time: 16 MB of float32


def cross_entropy_(logits: Tensor, targets: Tensor, scale: float = 1.0, losses: Tensor | None = None) -> Tensor:
    """The negative log-likelihood of each row's target; `logits` become scale * (softmax - onehot).

    logits    [n, V], rows contiguous; overwritten, rounded once to their dtype
    targets   int64 [n], each from 0 to V - 1
    losses    where the result is written; None: a new tensor
    returns   [n] float32 (float64 for float64)

    Not an autograd operation. Raises ShapeError for other shapes, strides or targets.
    """
    logits = logits.detach()
    losses = _new_losses(logits) if losses is None else losses
    _cross_entropy(logits, targets, scale, logits, losses)
    return losses


def cross_entropy_reference(logits: Tensor, targets: Tensor, scale: float, out: Tensor | None, losses: Tensor) -> None:
    """The slow, plain form: fills `losses` [n], and `out` [n, V] with the gradient (logits themselves, or None)."""
    rows = max(1, min(logits.shape[0], _CHUNK_VALUES // max(1, logits.shape[-1])))
    # two buffers for all chunks: glibc finds no room for a large buffer where one of its size was freed
    upcast = logits.new_empty(rows, logits.shape[-1], dtype=losses.dtype)
    result = torch.empty_like(upcast)
    for at in rounds(logits.shape[0], rows):
        want = targets[at]
        wide = upcast[: len(want)].copy_(logits[at])
        logp = torch.ops.aten._log_softmax.out(wide, -1, False, out=result[: len(want)])
        row = torch.arange(len(want), device=want.device)
        losses[at] = -logp[row, want]
        if out is not None:
            probs = logp.exp_()
            probs[row, want] -= 1.0
            out[at] = probs if scale == 1.0 else probs.mul_(scale)


class _SummedCrossEntropy(torch.autograd.Function):
    """d loss / d logits_i = softmax(logits_i) - onehot(target_i), kept in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, spend: bool) -> Tensor:
        rows, losses = logits.detach().contiguous(), _new_losses(logits)
        grad = None if not logits.requires_grad else rows if spend else torch.empty_like(rows)
        _cross_entropy(rows, targets.contiguous(), 1.0, grad, losses)
        if grad is rows:
            torch.autograd.graph.increment_version(logits)  # whoever else kept them for a backward is told
        ctx.grad, ctx.spend = grad, spend
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.grad is None:
            raise RuntimeError("The backward of a loss that spends its logits runs once: they are used up.")
        scale = grads[0]  # the scalar stays float32: rounded, it would scale every step's gradient
        if not ctx.spend:
            return ctx.grad * scale, None, None
        grad, ctx.grad = ctx.grad.mul_(scale), None
        return grad, None, None


def summed_cross_entropy(logits: Tensor, targets: Tensor, *, spend: bool = False) -> Tensor:
    """Summed negative log-likelihood of `targets` [n] under `logits` [n, V]: a float32 scalar. Differentiable.

    spend   nobody else reads the logits: their gradient, as large as they are, takes their place. Runs backward once
    """
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets, spend)
    return loss


def _new_losses(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(logits: Tensor, targets: Tensor, scale: float, out: Tensor | None, losses: Tensor) -> None:
    if not calls.suits(logits, out):
        cross_entropy_reference(logits, targets, scale, out, losses)
    elif not logits.is_meta:
        calls.cross_entropy(logits, targets, scale, out, losses)
