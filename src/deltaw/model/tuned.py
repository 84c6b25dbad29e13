"""The scales of a quantised network, tuned until it answers as the dense one does: distillation with its codes kept.

    s_b = s0_b exp(t_b)               t trains, so a scale stays positive and a step is a share of it; t = 0 at first
    dL/dt_b = sum over block b of dL/dW_i W_i      dL/dW = g^T x
    L = mean over tokens of KL(dense || quantised) over the vocabulary

Source: EfficientQAT (arXiv:2407.11062), section 3.3, trains the step sizes of frozen codes from end to end, by the
text itself; here the dense network is the teacher, so that nothing but what quantising changed is to be learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.errors import BaseError, DataError
from deltaw.formats import BlockwiseWeight
from deltaw.model.frozen import FrozenLinear
from deltaw.model.quantised import put_module
from deltaw.ops.blockwise import Blocks, Scales, dequantise, mul, mul_t, quantise_scales

RATE = 2e-3
"""The largest step of Adam: about the share of a scale that one step changes."""

STEP_TOKENS = 2048
"""Tokens whose gradients go into a step."""

HELD_OUT = 8
"""One window of so many is not learned from: it says whether a pass helped."""

_BETAS = (0.9, 0.95)
_WARMUP = 0.05  # of all steps
_AT_A_TIME = 512  # tokens in one forward pass
_ROWS = 128  # tokens whose probabilities are in float32 at a time


@dataclass(frozen=True)
class Tuning:
    """What tuning did.

    passes     over the text
    held_out   tokens that were not learned from
    before, after  the mean KL divergence from the dense network on these, in nats a token, scales as they are stored
    """

    passes: int
    held_out: int
    before: float
    after: float


def tune_scales(
    net: PreTrainedModel,
    dense: PreTrainedModel,
    ids: Tensor,
    passes: int = 1,
    say: Callable[[str], None] | None = None,
) -> Tuning:
    """Tune the scales of a quantised network towards `dense`, in place; the codes stay.

    dense   the network that it was made from, in the same dtype
    ids     tokens [n, length], as `windows` gives them
    passes  over those that are learned from, one or more

    After each pass the scales are judged as they are stored (double quantisation rounds them) on the held-out windows;
    the best are kept, those from before the first pass among them. Beside the two networks it holds the logits of some
    512 tokens twice, what their backward needs, and 16 bytes a block of codes.

    Raises DataError where no window is left to learn from, BaseError where the divergence is not finite.
    """
    held = torch.arange(len(ids)) % HELD_OUT == HELD_OUT - 1
    held[-1] |= not bool(held.any())
    learned, kept = ids[~held], ids[held]
    if not len(learned):
        raise DataError(
            f"tuning has one window of {ids.shape[1]} tokens: nothing would be left to judge it by.\n"
            "  Give more text, or tune nothing (no passes)."
        )
    modules = {n: m for n, m in net.named_modules() if isinstance(m, FrozenLinear)}
    best = {n: m.frozen for n, m in modules.items()}
    before = least = _divergence(net, dense, kept)
    with _tunable(net, modules) as tuned:
        optimizer = torch.optim.Adam([t.grown for t in tuned.values()], lr=RATE, betas=_BETAS)
        per_step = max(1, STEP_TOKENS // ids.shape[1])
        n_steps, rng = passes * -(-len(learned) // per_step), torch.Generator().manual_seed(0)
        done = 0
        for number in range(1, passes + 1):
            for part in learned[torch.randperm(len(learned), generator=rng)].split(per_step):
                optimizer.param_groups[0]["lr"] = RATE * _share(done, n_steps)
                optimizer.zero_grad()
                _divergence(net, dense, part, learn=True)
                optimizer.step()
                done += 1
            found = _divergence(net, dense, kept)
            if found < least:
                least, best = found, {n: t.rounded() for n, t in tuned.items()}
            if say:
                say(f"tuned scales, pass {number} of {passes}: {found:.4f} nats from dense, {before:.4f} before")
    for name, module in modules.items():
        module.frozen = best[name]
    return Tuning(passes, kept.numel(), before, least)


def _share(done: int, n_steps: int) -> float:
    """Of RATE after `done` steps: up in a straight line, then down a cosine."""
    return min(1.0, (done + 1) / (_WARMUP * n_steps)) * 0.5 * (1 + math.cos(math.pi * done / n_steps))


def _divergence(net: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, learn: bool = False) -> float:
    """Mean KL(dense || net) over the tokens of `ids`; with `learn` the gradient of their sum is added to what trains
    (Adam does not see the difference, and in half precision a token's share of a mean would be lost).

    Raises BaseError where it is not finite.
    """
    total = 0.0
    for part in ids.split(max(1, _AT_A_TIME // ids.shape[1])):
        with torch.no_grad():
            wanted = dense(input_ids=part, use_cache=False).logits.flatten(0, 1)
        with torch.set_grad_enabled(learn):
            found = net(input_ids=part, use_cache=False).logits.flatten(0, 1)
        with torch.no_grad():
            for p_logits, q_logits in zip(wanted.split(_ROWS), found.detach().split(_ROWS), strict=True):
                log_p, log_q = (x.float().log_softmax(-1) for x in (p_logits, q_logits))
                p = log_p.exp()
                total += float((p * (log_p - log_q)).sum())
                p_logits.copy_(log_q.exp_().sub_(p))  # dL/dlogits of the sum, where they came from
        if learn:
            found.backward(wanted)
    if not math.isfinite(total):
        raise BaseError("scales cannot be tuned: the divergence from the dense network is not finite.")
    return total / ids.numel()


class _Tunable(nn.Module):
    """A quantised linear map while its scales train. Without gradients it computes with what would be stored.

    grown   t [n_blocks] float32: the logarithm of what each scale has grown by
    """

    def __init__(self, module: FrozenLinear) -> None:
        super().__init__()
        self.frozen: BlockwiseWeight = module.frozen  # type: ignore[assignment]
        self.bias = module.bias
        self._start = self.frozen.blocks.scales.plain()
        self.grown = nn.Parameter(torch.zeros_like(self._start))

    def blocks(self) -> Blocks:
        """The matrix with its scales as they are now, not rounded."""
        return replace(self.frozen.blocks, scales=Scales(self._start * self.grown.detach().exp()))

    def rounded(self) -> BlockwiseWeight:
        """The weight as it is stored."""
        now, double = self.blocks(), self.frozen.double_quant
        scales = quantise_scales(now.scales.absmax) if double else now.scales
        return type(self.frozen)(replace(now, scales=scales), self.frozen.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        if not torch.is_grad_enabled():
            return self.rounded().mul(x, self.bias)
        y: Tensor = _Product.apply(x, self.grown, self)
        return y


class _Product(torch.autograd.Function):
    """y = x W^T + b, W with its scales as they are: dL/dx = g W, dL/dt by block. The dense W is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grown: Tensor, module: _Tunable) -> Tensor:
        ctx.save_for_backward(x)
        ctx.blocks = module.blocks()
        return mul(x, ctx.blocks, module.bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (g,), blocks = ctx.saved_tensors, grads, ctx.blocks
        slope = (g.flatten(0, -2).T @ x.flatten(0, -2)).float().mul_(dequantise(blocks)).view(-1)
        short = -slope.numel() % blocks.block
        by_block = nn.functional.pad(slope, (0, short)).view(-1, blocks.block).sum(1)
        return (mul_t(g, blocks) if ctx.needs_input_grad[0] else None), by_block, None


@contextmanager
def _tunable(net: nn.Module, modules: dict[str, FrozenLinear]) -> Iterator[dict[str, _Tunable]]:
    """Inside, the quantised maps of `net` train their scales."""
    made = {n: _Tunable(m) for n, m in modules.items()}
    try:
        for name in made:
            put_module(net, name, made[name])
        yield made
    finally:
        for name in modules:
            put_module(net, name, modules[name])
