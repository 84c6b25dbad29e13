"""Causal attention inside each document of a pack, forward and backward; documents do not see each other.

    S = scale q k^T, hidden above the diagonal and beyond the window    P = softmax(S)    o = P v    lse = log sum exp S

    dP = g v^T    dS = P (dP - sum(g o))    dq = scale dS k    dk = scale dS^T q    dv = P^T g

q, o, g [T, H, D]; k, v [T, G, D], H a multiple of G; bounds [n + 1] int64: document d is [bounds[d], bounds[d + 1])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from deltaw.ops.native import attention_calls as calls
from deltaw.ops.native.attention_calls import WIDEST, Setting
from deltaw.ops.native.library import running

Three = tuple[Tensor, Tensor, Tensor]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    scale: float,
    *,
    window: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(o, lse): o [T, H, D] in q's dtype, in `out` if that is given; lse [H, T] float32 (float64 of float64).

    window   a token sees itself and the window - 1 tokens before it; None: all of its document before it
    """
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    if q.is_meta:
        return o, lse
    if _native(q):
        calls.attend(q, k, v, Setting(bounds, scale, window), o, lse)
        return o, lse
    for at, scores in _scores(q, k, bounds, scale, window):
        lse[:, at] = scores.logsumexp(-1)
        o[at] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), _shared(v[at], q)).to(q.dtype)
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
    out: Three | None = None,
) -> Three:
    """(dq, dk, dv) from g = dL/do and what `attend` gave; in `out`, which may be q, k and v themselves."""
    dq, dk, dv = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)) if out is None else out
    if q.is_meta:
        return dq, dk, dv
    if _native(q):
        calls.attend_backward((q, k, v, o, g), lse, Setting(bounds, scale, window), (dq, dk, dv))
        return dq, dk, dv
    shared = k.shape[1]
    for at, scores in _scores(q, k, bounds, scale, window):
        p = (scores - lse[:, at].unsqueeze(-1)).exp()
        wide_g, wide_q = g[at].to(p.dtype), q[at].to(p.dtype)
        delta = (wide_g * o[at]).sum(-1).T.unsqueeze(-1)
        ds = p * (torch.einsum("ihd,jhd->hij", wide_g, _shared(v[at], q)) - delta) * scale
        grads = [
            torch.einsum("hij,jhd->ihd", ds, _shared(k[at], q)),
            torch.einsum("hij,ihd->jhd", ds, wide_q).unflatten(1, (shared, -1)).sum(2),
            torch.einsum("hij,ihd->jhd", p, wide_g).unflatten(1, (shared, -1)).sum(2),
        ]
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place[at] = grad.to(q.dtype)
    return dq, dk, dv


def _native(q: Tensor) -> bool:
    known = q.is_cpu and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] <= WIDEST
    return known and running() is not None


def _shared(t: Tensor, q: Tensor) -> Tensor:
    """Keys or values [L, G, D] repeated for the heads that share them: [L, H, D], at least float32."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    return wide.repeat_interleave(q.shape[1] // t.shape[1], 1)


def _scores(q: Tensor, k: Tensor, bounds: Tensor, scale: float, window: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Each document's place, and its scores [H, L, L] with minus infinity where a token does not look."""
    for start, end in itertools.pairwise(bounds.tolist()):
        at, n = slice(start, end), end - start
        scores = torch.einsum("ihd,jhd->hij", q[at].to(_shared(k[at], q).dtype), _shared(k[at], q)) * scale
        seen = torch.ones(n, n, dtype=torch.bool, device=q.device).tril_()
        if window is not None:
            seen &= torch.ones_like(seen).triu_(1 - window)
        yield at, scores.masked_fill_(~seen, float("-inf"))
