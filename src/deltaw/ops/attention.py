"""Attention over a pack: causal within each document, nothing across, key-value heads shared by groups of query heads.

    S = scale Q K^T    P = softmax(S)    O = P V    lse = log of the sum of exp(S)

q [T, H, D], k and v [T, G, D] with H a multiple of G, bounds int64 [n + 1] from 0 to T. A token sees itself and, with a
window, the window - 1 tokens before it. A document may go on where another ends, its front: it sees the front's tokens
too, which are computed once for all that follow. The compiled form (native/attention.h) keeps no score matrix; the
plain form, `attend_reference` and `attend_backward_reference`, has one for each document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops import cuda
from deltaw.ops.native import attention_calls, library

Gradients = tuple[Tensor, Tensor, Tensor]


def suits(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None) -> bool:
    """Whether a form without score matrices computes this, no softcap, at most 256 features: the compiled one on a CPU
    (float32 or bfloat16), PyTorch's flash attention on a GPU (16 bits).

    On the meta device it stands for what a CPU would do.
    """
    return cuda.suits_flash(q, k, v, softcap) or _suits_native(q, k, v, scale, softcap)


def _suits_native(q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None) -> bool:
    dtypes, kinds = {t.dtype for t in (q, k, v)}, {t.device.type for t in (q, k, v)}
    fits = k.shape == v.shape and q.shape[-1] == k.shape[-1] <= attention_calls.WIDEST and softcap is None and scale > 0
    known = dtypes in ({torch.float32}, {torch.bfloat16}) and kinds in ({"cpu"}, {"meta"})
    return fits and known and library.running() is not None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    fronts: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o [T, H, D] contiguous, lse float32 [H, T]); `out` is o's place. softcap: c * tanh(score / c). fronts int64 [n]:
    the document that each goes on from, -1 for none.

    The strides of tokens and heads are free; features lie side by side. Scores, softmax and sums are float32. With
    bfloat16 products P is rounded to bfloat16 for P V. Raises ShapeError for shapes that do not belong together.
    Online softmax: Milakov and Gimelshein, arXiv:1805.02867; tiles: Dao et al., arXiv:2205.14135.
    """
    _check(q, k, v)
    if not _suits_native(q, k, v, scale, softcap):
        if cuda.suits_flash(q, k, v, softcap) and fronts is None:
            o, lse = cuda.flash(q, k, v, bounds, scale, window)
        else:
            o, lse = attend_reference(q, k, v, bounds, scale, window=window, softcap=softcap, fronts=fronts)
        return (o if out is None else out.copy_(o)), lse
    o = q.new_empty(q.shape) if out is None else out
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if not q.is_meta and q.numel():
        q, k, v = _side_by_side(q), _side_by_side(k), _side_by_side(v)
        attention_calls.attend(q, k, v, attention_calls.Setting(bounds, scale, window, fronts), o, lse)
    return o, lse


def attend_backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bounds: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    fronts: Tensor | None = None,
    out: Gradients | None = None,
) -> Gradients:
    """(dq, dk, dv) from g = dL/do and what `attend` gave; each has its input's shape and strides, or is in `out`.

        dP = g V^T    dS = P (dP - rowsum(g o)) scale    dq = dS K    dk = dS^T Q    dv = P^T g

    P is computed again from lse. `out` may be q (or g), k and v themselves: a document's heads are read before their
    gradients are written. It may not overlap them in another way. Dao et al., arXiv:2205.14135, section B.2.
    """
    _check(q, k, v)
    if not _suits_native(q, k, v, scale, softcap):
        if cuda.suits_flash(q, k, v, softcap) and fronts is None:
            found = cuda.flash_backward(g, (q, k, v, o), lse, bounds, scale, window)
        else:
            found = attend_backward_reference(
                g, q, k, v, o, lse, bounds, scale, window=window, softcap=softcap, fronts=fronts
            )
        if out is None:
            return found
        for place, gradient in zip(out, found, strict=True):
            place.copy_(gradient)
        return out
    rows = tuple(_side_by_side(t) for t in (q, k, v, o, g))
    places = (torch.empty_like(rows[0]), torch.empty_like(rows[1]), torch.empty_like(rows[2])) if out is None else out
    if not q.is_meta and q.numel():
        attention_calls.attend_backward(rows, lse, attention_calls.Setting(bounds, scale, window, fronts), places)
    return places


class _Attention(torch.autograd.Function):
    """`attend`, whose backward is `attend_backward`; q, k, v, o and lse are kept."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None, cap: float | None
    ) -> Tensor:
        o, lse = attend(q, k, v, bounds, scale, window=window, softcap=cap)
        ctx.save_for_backward(q, k, v, o, lse, bounds)
        ctx.how = (scale, window, cap)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        scale, window, cap = ctx.how
        q, k, v, o, lse, bounds = ctx.saved_tensors
        found = attend_backward(grads[0], q, k, v, o, lse, bounds, scale, window=window, softcap=cap)
        return (*found, None, None, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """o [T, H, D] of `attend`, differentiable in q, k and v."""
    o: Tensor = _Attention.apply(q, k, v, bounds, scale, window, softcap)
    return o


# The plain forms ------------------------------------------------------------------------------------------------------


def attend_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    fronts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The slow, plain form of `attend`: the whole score matrix of each document, in float32 (float64 for float64)."""
    o = q.new_empty(q.shape)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=_wide(q), device=q.device)
    for own, seen in _documents(bounds, len(q), fronts):
        qs, ks, vs = (_heads(t[rows], k.shape[1]) for t, rows in ((q, own), (k, seen), (v, seen)))
        scores = _scores(qs, ks, scale, window, softcap)[0]
        of_rows = scores.logsumexp(-1)
        o[own] = _rows((scores - of_rows[..., None]).exp() @ vs).to(q.dtype)
        lse[:, own] = of_rows.flatten(0, 1)
    return o, lse


def attend_backward_reference(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    bounds: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    fronts: Tensor | None = None,
) -> Gradients:
    """The slow, plain form of `attend_backward`. With a softcap dS is multiplied by its slope, 1 - tanh^2."""
    found = [torch.zeros(t.shape, dtype=_wide(t), device=t.device) for t in (q, k, v)]
    for own, seen in _documents(bounds, len(q), fronts):
        qs, ks, vs = (_heads(t[rows], k.shape[1]) for t, rows in ((q, own), (k, seen), (v, seen)))
        os, gs = _heads(o[own], k.shape[1]), _heads(g[own], k.shape[1])
        scores, slope = _scores(qs, ks, scale, window, softcap)
        p = (scores - lse[:, own].reshape(scores.shape[:-1])[..., None]).exp()
        ds = p * (gs @ vs.mT - (gs * os).sum(-1, keepdim=True)) * slope
        parts = ds @ ks, (ds.mT @ qs).sum(1, keepdim=True), (p.mT @ gs).sum(1, keepdim=True)
        for whole, part, rows in zip(found, parts, (own, seen, seen), strict=True):
            whole[rows] += _rows(part)
    dq, dk, dv = (whole.to(t.dtype) for whole, t in zip(found, (q, k, v), strict=True))
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, scale: float, window: int | None, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Scores [G, H / G, L, K] of the last L of K tokens with -inf where nothing is seen, and their slope in q k: a
    number, or a matrix."""
    scores = q @ k.mT * scale
    slope = torch.as_tensor(scale, dtype=scores.dtype)
    if softcap is not None:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, scale * (1 - bent * bent)
    before = scores.shape[-1] - scores.shape[-2]
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    hidden = ones.triu(1 + before)
    if window is not None:
        hidden = hidden | ones.tril(before - max(1, window))
    return scores.masked_fill(hidden, float("-inf")), slope


def _documents(bounds: Tensor, tokens: int, fronts: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(its own tokens, those that they see) of each document."""
    ends = attention_calls.checked_bounds(bounds, tokens)
    all_of = [torch.arange(a, b) for a, b in itertools.pairwise(ends)]
    for own, front in zip(all_of, attention_calls.checked_fronts(fronts, ends), strict=True):
        if len(own):
            yield own, own if front < 0 else torch.cat([all_of[front], own])


def _heads(t: Tensor, shared: int) -> Tensor:
    """[L, H, D] as [G, H / G, L, D], in the dtype that sums are taken in."""
    return t.to(_wide(t)).reshape(len(t), shared, -1, t.shape[-1]).permute(1, 2, 0, 3)


def _rows(t: Tensor) -> Tensor:
    """[G, H / G, L, D] as [L, H, D]."""
    return t.permute(2, 0, 1, 3).flatten(1, 2)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _side_by_side(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    together = q.ndim == k.ndim == 3 and k.shape == v.shape and q.shape[::2] == k.shape[::2]
    if not together or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} do not belong together.\n"
            "  Needed: [T, H, D] and twice [T, G, D], H a multiple of G."
        )
