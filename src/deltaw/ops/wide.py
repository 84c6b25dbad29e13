"""Products of many rows with frozen matrices, and what an adapter adds to them, as one sum.

    y = onto + bias + s x_1 M_1 + x_2 M_2 + ...      for each band of columns; x_i [n, depth_i], M_i [depth_i, columns]

A LoRA's forward is one band of two terms, u B^T and x W^T; the gradient of q, k and v's input is one of four. The
compiled form (native/wide.h, bfloat16) writes y once and rounds it once, whatever it is the sum of, and reads a matrix
in few bits from its codes. A frozen matrix must give an even number of terms to a sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.core.weight import Weight
from deltaw.ops.arena import Arena
from deltaw.ops.native import wide_calls


class Frozen(NamedTuple):
    """A frozen matrix W [out, in] as a factor: M = W^T [in, out], or W where it goes `back`."""

    weight: Weight
    back: bool = False


class Term(NamedTuple):
    """scale x M: x [n, depth] with its columns side by side; m a plain [depth, columns] or a frozen matrix."""

    x: Tensor
    m: Tensor | Frozen
    scale: float = 1.0


class Band(NamedTuple):
    """y [n, columns], to be filled, and what it is the sum of; `onto` may be y itself. bias [columns] in any dtype."""

    y: Tensor
    terms: Sequence[Term]
    bias: Tensor | None = None
    onto: Tensor | None = None


def products(bands: Sequence[Band], arena: Arena) -> None:
    """Fill every band's y. Where only the first of a band's terms is scaled, and is thin, nothing is copied."""
    with arena.scratch():
        native = _native(bands, arena)
        if native is None:
            for band in bands:
                _plain(band, arena)
            return
        n, like = bands[0].y.shape[0], bands[0].y
        size = wide_calls.room(n, [b.y.shape[1] for b in bands])
        room = arena.borrow(size, like=like, dtype=torch.uint8)
        if not like.is_meta and n:
            wide_calls.products(native, room)


def products_reference(bands: Sequence[Band]) -> list[Tensor]:
    """The slow, plain form, in float64: what `products` fills in, before it is rounded."""
    found = []
    for y, terms, bias, onto in bands:
        total = torch.zeros(y.shape, dtype=torch.float64)
        for x, m, scale in terms:
            if isinstance(m, Frozen):
                w = m.weight.dense(x.dtype)
                m = w if m.back else w.T
            total += scale * (x.double() @ m.double())
        found.append(sum((t.double() for t in (bias, onto) if t is not None), total))
    return found


def _native(bands: Sequence[Band], arena: Arena) -> list[wide_calls.Band] | None:
    """The bands as the compiled form takes them; None where it does not run."""
    y = bands[0].y
    if y.dtype != torch.bfloat16 or y.device.type not in ("cpu", "meta") or not wide_calls.available():
        return None
    found = []
    for band in bands:
        terms = []
        for i, (x, m, scale) in enumerate(band.terms):
            if x.dtype != y.dtype or x.stride(1) != 1 or (x.shape[1] % 2 and isinstance(m, Frozen)):
                return None
            if isinstance(m, Frozen):
                raw = m.weight.native(y.dtype)
                if raw is None:
                    return None
                factor = (raw if m.back else raw.T) if isinstance(raw, Tensor) else (raw, m.back)
            elif x.shape[1] % 2:
                x, factor = _even(x, 1, arena), _even(m, 0, arena)
            else:
                factor = m
            if scale != 1 and (i or len(band.terms) < 2 or x.shape[1] > wide_calls.LEAD):
                x = torch.mul(x, scale, out=arena.borrow(*x.shape, like=x))
                scale = 1.0
            terms.append(wide_calls.Term(x, factor, scale))
        bias = None if band.bias is None else band.bias.detach().float().contiguous()
        found.append(wide_calls.Band(band.y, terms, bias, band.onto))
    return found


def _even(t: Tensor, dim: int, arena: Arena) -> Tensor:
    """A copy with zeros behind an odd number of terms."""
    n = t.shape[dim]
    out = arena.borrow(*(s + (d == dim) for d, s in enumerate(t.shape)), like=t)
    if not out.is_meta:
        out.narrow(dim, 0, n).copy_(t)
        out.narrow(dim, n, 1).zero_()
    return out


def _plain(band: Band, arena: Arena) -> None:
    """By PyTorch's products, each rounded: frozen matrices first, what an adapter adds behind them, `onto` last."""
    y, terms, bias, onto = band
    begun = onto is y
    if bias is not None:
        y.add_(bias) if begun else y.copy_(bias.expand_as(y))
        begun = True
    for x, m, scale in sorted(terms, key=lambda t: not isinstance(t.m, Frozen)):
        with arena.scratch():
            factor = _dense(m, x, arena) if isinstance(m, Frozen) else m
            if begun:
                y.addmm_(x, factor, alpha=scale)
            else:
                torch.mm(x, factor, out=y)
                if scale != 1:
                    y *= scale
        begun = True
    if onto is not None and onto is not y:
        y += onto  # last: sums that begin at a large residual lose what is small


def _dense(m: Frozen, like: Tensor, arena: Arena) -> Tensor:
    w = m.weight
    dense = w.dense(like.dtype, lambda: arena.borrow(w.out_features, w.in_features, like=like))
    return dense if m.back else dense.T
