"""A Llama-like block, forward and backward by hand: attention and a gated FFN, each with its norm and residual.

    x [T, d]    n = w x rstd, rstd = 1 / sqrt(mean(x^2) + eps)         RMSNorm, arXiv:1910.07467, equation 4
    attention half    y = x + O attend(rope(Q n), rope(K n), V n)      FFN half    y = x + D (act(G n) * U n)

Q, K, V, O, G, U, D are frozen matrices wearing any Affine (ops/maps.py). Documents of a pack do not see each other.
Kept for the backward: each half's input and rstd, the rotated q k v (and those before the heads' norms, where there
are some), attention's output and log-sum-exps, gate and up, and the thin u of every map. Made again, for one pass over
memory each: the normed inputs and act(G n) * U n.

Backward of a half, g = dL/dy: through the output map, what lies before it, the input maps, and the norm, whose pass
also adds the residual's g:

    dL/dx = g + rstd (w dL/dn - x^ mean(w dL/dn x^)),  x^ = x rstd;    dL/dw = sum of rows of dL/dn x^

Compared with transformers' blocks under autograd in tests/fused/test_fused_parity.py, with differences in float64 in
tests/ops/test_ops_block.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deltaw.ops import maps
from deltaw.ops.arena import Arena
from deltaw.ops.attention import attend, attend_backward
from deltaw.ops.gated import gated, gated_backward_
from deltaw.ops.maps import Kept, Map
from deltaw.ops.rms import rms_norm, rms_norm_backward
from deltaw.ops.rope import rotate_

Mode = Literal["keep", "again", "forget"]
"""Keep what the backward needs, compute the block again in the backward, or have no backward."""

Grads = list[Tensor | None]


@dataclass(frozen=True)
class Norm:
    """An RMSNorm by weight [d], or by 1 + weight (Gemma)."""

    weight: Tensor
    eps: float
    one_plus: bool = False

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Fill `out` with the normed rows; returns rstd."""
        return rms_norm(x, self.weight, self.eps, one_plus=self.one_plus, out=out)[1]

    def backward(self, g: Tensor, x: Tensor, rstd: Tensor, out: Tensor | None, add: Tensor | None = None) -> Grads:
        """Fill `out` with dL/dx (+ add); returns [dL/dweight], [None] where it is not trained."""
        need = self.weight.requires_grad
        if out is None and not need:
            return [None]
        _, dw = rms_norm_backward(g, x, self.weight, rstd, one_plus=self.one_plus, add=add, need_weight=need, out=out)
        return [None if dw is None else dw.to(self.weight.dtype)]


@dataclass(frozen=True)
class AttentionHalf:
    """inputs: q, k, v, or one map that makes all three; q_norm and k_norm: of each head (Qwen 3), both or none."""

    norm: Norm
    inputs: tuple[Map, ...]
    output: Map
    heads: int
    shared: int
    dim: int
    scale: float
    window: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclass(frozen=True)
class FeedForward:
    """inputs: gate, up, or one map that makes both; act: "silu", "gelu" or "gelu_tanh"."""

    norm: Norm
    inputs: tuple[Map, ...]
    output: Map
    act: str


@dataclass(frozen=True)
class Block:
    """Both halves."""

    attention: AttentionHalf
    ffn: FeedForward

    def parameters(self) -> list[Tensor]:
        """Every tensor that may get a gradient, in the order in which the backward gives them."""
        a, f = self.attention, self.ffn
        heads = [n.weight for n in (a.q_norm, a.k_norm) if n is not None]
        own = [a.norm.weight, *maps.parameters(a.inputs), *heads, *maps.parameters([a.output])]
        return [*own, f.norm.weight, *maps.parameters(f.inputs), *maps.parameters([f.output])]


@dataclass(frozen=True)
class Pack:
    """What the blocks of one forward share.

    bounds     [D + 1] int64, of documents       cos, sin   [T, R] float32, of each token's position
    fronts     [D] int64, the document that each goes on from (`ops.attention`), or None
    """

    bounds: Tensor
    cos: Tensor
    sin: Tensor
    fronts: Tensor | None = None


# The attention half ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attended:
    x: Tensor
    rstd: Tensor
    qkv: Tensor  # as attention read it
    raw: Tensor | None  # before the heads' norms
    head_rstd: tuple[Tensor, ...]
    o: Tensor
    lse: Tensor
    inner: Kept
    outer: Kept


def _split(wide: Tensor, group: Sequence[Map]) -> tuple[Tensor, ...]:
    """The columns of each map of a group that fills `wide`."""
    return torch.split(wide, [m.weight.out_features for m in group], dim=1)


def _heads(half: AttentionHalf, qkv: Tensor) -> list[Tensor]:
    """q, k and v as views [T, heads, D] of their columns."""
    counts = (half.heads, half.shared, half.shared)
    parts = torch.split(qkv, [n * half.dim for n in counts], dim=1)
    return [part.unflatten(1, (n, half.dim)) for part, n in zip(parts, counts, strict=True)]


def _attention_forward(
    half: AttentionHalf, x: Tensor, pack: Pack, rows: Tensor | None, y: Tensor, arena: Arena
) -> _Attended:
    """Fill y with x + attention, for all rows or for `rows`."""
    n_tokens, width = x.shape[0], (half.heads + 2 * half.shared) * half.dim
    qkv = arena.keep(n_tokens, width, like=x, apart=True)
    raw: Tensor | None = None
    head_rstd: tuple[Tensor, ...] = ()
    with arena.scratch():
        normed = arena.borrow(*x.shape, like=x, apart=True)
        rstd = half.norm.forward(x, normed)
        if half.q_norm is None or half.k_norm is None:
            inner = maps.forward(half.inputs, normed, _split(qkv, half.inputs), arena)
        else:
            raw = arena.keep(n_tokens, width, like=x, apart=True)
            inner = maps.forward(half.inputs, normed, _split(raw, half.inputs), arena)
            before, after = _heads(half, raw), _heads(half, qkv)
            norms = (half.q_norm, half.k_norm)
            head_rstd = tuple(n.forward(b, a) for n, b, a in zip(norms, before, after, strict=False))
            after[2].copy_(before[2])
    q, k, v = _heads(half, qkv)
    rotate_(q, pack.cos, pack.sin)
    rotate_(k, pack.cos, pack.sin)
    o = arena.keep(n_tokens, half.heads, half.dim, like=x, apart=True)
    _, lse = attend(q, k, v, pack.bounds, half.scale, window=half.window, fronts=pack.fronts, out=o)
    flat, onto = o.flatten(1), x
    if rows is not None:
        flat, onto = flat[rows], x[rows]
    outer = maps.forward([half.output], flat, [y], arena, onto=onto)
    return _Attended(x, rstd, qkv, raw, head_rstd, o, lse, inner, outer)


def _attention_backward(
    half: AttentionHalf, kept: _Attended, g: Tensor, pack: Pack, rows: Tensor | None, dx: Tensor | None, arena: Arena
) -> Grads:
    """Fill dx [T, d]; the gradients of the half's parameters. g [n, d] is of `rows`, or of all."""
    flat = kept.o.flatten(1)
    do = arena.borrow(*flat.shape, like=flat, apart=True)
    if rows is None:
        outer = maps.input_gradient([half.output], kept.outer, [g], do, arena)
    else:
        wanted = flat.new_empty(len(rows), flat.shape[1])
        outer = maps.input_gradient([half.output], kept.outer, [g], wanted, arena)
        do.zero_().index_copy_(0, rows, wanted)
        flat = flat[rows]
    of_output = maps.parameter_gradients([half.output], kept.outer, outer, [g], flat, arena)
    q, k, v = grads = _heads(half, kept.qkv)  # gradients take the places of what they are of
    how: dict[str, Any] = {"window": half.window, "fronts": pack.fronts, "out": (q, k, v)}
    attend_backward(do.view_as(kept.o), q, k, v, kept.o, kept.lse, pack.bounds, half.scale, **how)
    rotate_(grads[0], pack.cos, pack.sin, back=True)
    rotate_(grads[1], pack.cos, pack.sin, back=True)
    of_heads: Grads = []
    if kept.raw is not None and half.q_norm is not None and half.k_norm is not None:
        for n, d, r, s in zip((half.q_norm, half.k_norm), grads, _heads(half, kept.raw), kept.head_rstd, strict=False):
            of_heads += n.backward(d, r, s, d)
    normed = arena.borrow(*kept.x.shape, like=flat, apart=True)
    dnormed = (
        None
        if dx is None and not half.norm.weight.requires_grad
        else arena.borrow(*kept.x.shape, like=flat, apart=True)
    )
    parts = _split(kept.qkv, half.inputs)
    inner = maps.input_gradient(half.inputs, kept.inner, parts, dnormed, arena)
    half.norm.forward(kept.x, normed)
    of_inputs = maps.parameter_gradients(half.inputs, kept.inner, inner, parts, normed, arena)
    of_norm: Grads = [None]
    if dnormed is not None:
        if dx is not None and rows is not None:
            g = torch.zeros_like(kept.x).index_copy_(0, rows, g)
        of_norm = half.norm.backward(dnormed, kept.x, kept.rstd, dx, None if dx is None else g)
    return [*of_norm, *of_inputs, *of_heads, *of_output]


# The FFN half ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _FedForward:
    x: Tensor
    rstd: Tensor
    gate_up: Tensor
    inner: Kept
    outer: Kept


def _ffn_forward(half: FeedForward, x: Tensor, y: Tensor, arena: Arena) -> _FedForward:
    """Fill y with x + FFN."""
    width = half.output.weight.in_features
    gate_up = arena.keep(x.shape[0], 2 * width, like=x, apart=True)
    with arena.scratch():
        normed = arena.borrow(*x.shape, like=x, apart=True)
        rstd = half.norm.forward(x, normed)
        inner = maps.forward(half.inputs, normed, _split(gate_up, half.inputs), arena)
    with arena.scratch():
        gate, up = gate_up.split(width, dim=1)
        h = gated(gate, up, half.act, out=arena.borrow(x.shape[0], width, like=x, apart=True))
        outer = maps.forward([half.output], h, [y], arena, onto=x)
    return _FedForward(x, rstd, gate_up, inner, outer)


def _ffn_backward(half: FeedForward, kept: _FedForward, g: Tensor, dx: Tensor, arena: Arena) -> Grads:
    """Fill dx; the gradients of the half's parameters. gate_up is used up."""
    width = half.output.weight.in_features
    gate, up = kept.gate_up.split(width, dim=1)
    dh = arena.borrow(g.shape[0], width, like=g, apart=True)
    outer = maps.input_gradient([half.output], kept.outer, [g], dh, arena)
    h = gated_backward_(dh, gate, up, half.act, h=arena.borrow(g.shape[0], width, like=g, apart=True))
    of_output = maps.parameter_gradients([half.output], kept.outer, outer, [g], h, arena)
    parts = _split(kept.gate_up, half.inputs)
    dnormed, normed = arena.borrow(*g.shape, like=g, apart=True), arena.borrow(*g.shape, like=g, apart=True)
    inner = maps.input_gradient(half.inputs, kept.inner, parts, dnormed, arena)
    half.norm.forward(kept.x, normed)
    of_inputs = maps.parameter_gradients(half.inputs, kept.inner, inner, parts, normed, arena)
    of_norm = half.norm.backward(dnormed, kept.x, kept.rstd, dx, g)
    return [*of_norm, *of_inputs, *of_output]


# Both under autograd --------------------------------------------------------------------------------------------------


def _result(x: Tensor, rows: Tensor | None, arena: Arena) -> Tensor:
    return arena.keep(x.shape[0] if rows is None else len(rows), x.shape[1], like=x, apart=True)


def _forward(
    block: Block, x: Tensor, pack: Pack, rows: Tensor | None, y: Tensor, arena: Arena
) -> tuple[_Attended, _FedForward]:
    """Fill y with the block at x."""
    between = arena.keep(*y.shape, like=x, apart=True)
    attended = _attention_forward(block.attention, x, pack, rows, between, arena)
    return attended, _ffn_forward(block.ffn, between, y, arena)


class _Fused(torch.autograd.Function):
    """The parameters are inputs only so that autograd hands their gradients on."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        block: Block,
        pack: Pack,
        rows: Tensor | None,
        arena: Arena,
        mode: Mode,
        spend: bool,
        *own: Tensor,
    ) -> Tensor:
        with arena.lock:
            result = arena.lease()
            y = _result(x, rows, arena)
            result.close()
            lease = arena.lease()
            attended, fed = _forward(block, x, pack, rows, y, arena)
            lease.close()
            ctx.what = (x.detach(), block, pack, rows, arena)
            ctx.result, ctx.kept, ctx.spend = result, (lease, attended, fed), spend
            if mode != "keep":
                lease.end()
                ctx.kept = None
            if mode == "forget":
                y = y.clone()
                result.end()
            return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.what is None:
            raise RuntimeError("A fused block's backward runs once: what it kept is used up.")
        (x, block, pack, rows, arena), kept, result = ctx.what, ctx.kept, ctx.result
        ctx.what = ctx.kept = ctx.result = None
        g = grads[0] if grads[0].stride(1) == 1 else grads[0].contiguous()
        dx = None if not ctx.needs_input_grad[0] else x if ctx.spend else torch.empty_like(x)
        with arena.lock, arena.scratch():
            if kept is None:
                lease = arena.lease()
                kept = (lease, *_forward(block, x, pack, rows, _result(x, rows, arena), arena))
                lease.close()
            lease, attended, fed = kept
            between = arena.borrow(*g.shape, like=g, apart=True)
            with arena.scratch():
                of_ffn = _ffn_backward(block.ffn, fed, g, between, arena)
            of_attention = _attention_backward(block.attention, attended, between, pack, rows, dx, arena)
            lease.end()
            result.end()
        return dx, None, None, None, None, None, None, *of_attention, *of_ffn


def fused(
    block: Block,
    x: Tensor,
    pack: Pack,
    arena: Arena,
    *,
    rows: Tensor | None = None,
    again: bool = False,
    spend: bool = False,
) -> Tensor:
    """The block at x [T, d]: [T, d], or [n, d] for `rows` [n] int64 ascending alone.

    again   keep the input and the result only and compute the block again in the backward
    spend   nobody else reads x: the backward writes its gradient over it. Between blocks that is the heap's worst hole

    What is kept lies in `arena` until the backward, which runs once, or until the result is forgotten.
    """
    own = block.parameters()
    needs = torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in own))
    mode: Mode = "again" if again and needs else "keep" if needs else "forget"
    y: Tensor = _Fused.apply(x, block, pack, rows, arena, mode, spend, *own)
    return y
