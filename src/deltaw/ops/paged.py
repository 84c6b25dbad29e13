"""Attention of new rows over paged keys and values, and products of few rows: what a serving step is made of.

    S = scale q K^T      P = softmax(S)      o = P V      a row sees its sequence's tokens in pages up to itself

Source: Efficient Memory Management for Large Language Model Serving with PagedAttention (arXiv:2309.06180). Compiled
forms (native/pages.h, native/rows.h) run where they can, the plain ones elsewhere. No autograd.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.ops.native import library
from deltaw.ops.native import pages_calls as calls


class Places(NamedTuple):
    """Where the rows of S sequences lie, in pages of 16 tokens.

    slots     [T] int64: where each row's keys and values go, page * 16 + place in the page
    bounds    [S + 1] int64: where sequences begin among the rows, and T
    contexts  [S] int64: tokens in pages before the sequence's first row
    tables    [S, P] int32: pages of each sequence, in order
    """

    slots: Tensor
    bounds: Tensor
    contexts: Tensor
    tables: Tensor


def paged_attention(
    q: Tensor,
    new: tuple[Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
    places: Places,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Put the rows' keys and values into their pages, then attend: o [T, H, D] in q's dtype.

    q       [T, H, D]; query head h reads key-value head h / (H / G)
    new     k and v [T, G, D]
    pages   keys and values [n_pages, 16, G, D], written at the slots
    window  a token sees itself and the window - 1 before it; None: all before it

    Scores and sums are float32. A row's result depends neither on the threads nor on the other sequences' rows.
    Raises ShapeError for shapes, dtypes and places that do not fit.
    """
    known = q.dtype in (torch.float32, torch.bfloat16) and q.shape[2] <= calls.WIDEST
    if not known or not q.is_cpu or library.running() is None:
        return paged_attention_reference(q, new, pages, places, scale, window)
    o = torch.empty(q.shape, dtype=q.dtype)
    calls.paged(q.contiguous(), (new[0].contiguous(), new[1].contiguous()), pages, places, scale, window, o)
    return o


def paged_attention_reference(
    q: Tensor,
    new: tuple[Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
    places: Places,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """The slow, plain form of `paged_attention`: one sequence after the other."""
    slots, bounds, contexts, tables = places
    for held, made in zip(pages, new, strict=True):
        held.flatten(0, 1).index_copy_(0, slots, made)
    o = torch.empty_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // pages[0].shape[2]
    ends = bounds.tolist()
    for s, before in enumerate(contexts.tolist()):
        rows, n = slice(ends[s], ends[s + 1]), before + ends[s + 1] - ends[s]
        table = tables[s, : -(-n // calls.PAGE)].long()
        k, v = (held[table].flatten(0, 1)[:n].to(wide).repeat_interleave(group, 1) for held in pages)
        at, key = torch.arange(before, n, device=q.device)[:, None], torch.arange(n, device=q.device)
        hidden = key > at if window is None else (key > at) | (key <= at - window)
        scores = torch.einsum("qhd,khd->hqk", q[rows].to(wide), k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        o[rows] = torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
    return o


def few_rows(x: Tensor, w: Tensor) -> Tensor:
    """x [n, cols] w^T, w [rows, cols] in float32 or bfloat16: [n, rows] float32, rounded nowhere on the way.

    W is read once where it lies, PANEL rows at a time, while every row of x passes. Raises ShapeError.
    """
    if library.running() is None or not w.is_cpu:
        return few_rows_reference(x, w)
    y = torch.empty(x.shape[0], w.shape[0], dtype=torch.float32)
    calls.dense(x, w, y)
    return y


def few_rows_reference(x: Tensor, w: Tensor) -> Tensor:
    """The slow, plain form of `few_rows`."""
    return F.linear(x.float(), w.float())
