"""Cross-entropy summed over rows, with the gradient made in the forward.

    logits [n, V], targets [n]  ->  sum_i (logsumexp(logits_i) - logits_i[target_i]), float32

Only one chunk of rows is ever held in float32. Reference: torch.nn.functional.cross_entropy(reduction="sum").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK_VALUES = 4_000_000  # logits upcast at a time: 16 MB of float32


class _SummedCrossEntropy(torch.autograd.Function):
    """d loss / d logits_i = softmax(logits_i) - onehot(target_i), kept in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        work = torch.promote_types(logits.dtype, torch.float32)
        total = torch.zeros((), dtype=work, device=logits.device)
        grad = torch.empty_like(logits) if logits.requires_grad else None
        rows = max(1, min(logits.shape[0], _CHUNK_VALUES // max(1, logits.shape[-1])))
        # two buffers for all chunks: glibc finds no room for a large buffer where one of its size was freed
        upcast = logits.new_empty(rows, logits.shape[-1], dtype=work)
        result = torch.empty_like(upcast)
        for start in range(0, logits.shape[0], rows):
            want = targets[start : start + rows]
            wide = upcast[: len(want)].copy_(logits[start : start + rows])
            logp = torch.ops.aten._log_softmax.out(wide, -1, False, out=result[: len(want)])
            row = torch.arange(len(want), device=want.device)
            total -= logp[row, want].sum()
            if grad is not None:
                probs = logp.exp_()
                probs[row, want] -= 1.0
                grad[start : start + rows] = probs
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0], None  # the scalar stays float32: rounded, it would scale every step's gradient


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed negative log-likelihood of `targets` [n] under `logits` [n, V]: a float32 scalar."""
    loss: Tensor = _SummedCrossEntropy.apply(logits, targets)
    return loss
