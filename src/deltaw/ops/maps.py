"""Linear maps that share one input, each with its Affine: forward and backward by hand, into given buffers.

For each map (core/affine.py has the formula), with d = out_gain - 1 and x' = in_gain * x:

    t = x' W^T + b + s u B^T,   u = x A^T,   y = t + d (t - b)

    G = dL/dy    dL/dt = g = G + d G           dL/dout_gain = sum of rows of G (t - b)      dL/db = sum of rows of G
    h = s g B    dL/dx = in_gain * (g W) + h A     dL/din_gain = sum of rows of x (g W)
    dL/dA = h^T x,   dL/dB = s g^T u

The factors A of all maps are stacked, so that u, h A and h^T x are one product each. Nothing but u (and t, where
there is a gain on outputs) is kept: the caller makes x again for the parameters' gradients.
Derived and compared with autograd over `ops.affine.apply` in tests/ops/test_ops_maps.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.weight import Weight
from deltaw.ops.arena import Arena
from deltaw.ops.rounds import rounds
from deltaw.ops.thin import thin_back
from deltaw.ops.wide import Band, Frozen, Term, products

_ROWS = 256
PARTS = ("A", "B", "out_gain", "in_gain", "bias")


@dataclass(frozen=True)
class Map:
    """A frozen matrix W [out, in], the base's own bias [out] or None, and what an adapter makes of it, or None."""

    weight: Weight
    bias: Tensor | None
    affine: Affine | None

    def part(self, name: str) -> Tensor | None:
        return None if self.affine is None else getattr(self.affine, name)

    @property
    def whole_bias(self) -> Tensor | None:
        changed = self.part("bias")
        return self.bias if changed is None else changed

    @property
    def rank(self) -> int:
        a = self.part("A")
        return 0 if a is None else a.shape[0]


@dataclass(frozen=True)
class Kept:
    """What the forward leaves for the backward.

    u            [n, R] of all maps
    a, b         A [R, in] of all maps, and B [out, r] of each, in x's dtype
    before_gain  t [n, out] of each map that has an out_gain
    """

    u: Tensor | None
    a: Tensor | None
    b: tuple[Tensor | None, ...]
    before_gain: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Inner:
    """What the input's gradient leaves for the parameters': h [n, R]; of each map u^T g [r, out]; g W with in_gain."""

    h: Tensor | None
    of_b: tuple[Tensor | None, ...]
    before_in_gain: tuple[Tensor | None, ...]


def parameters(maps: Sequence[Map]) -> list[Tensor]:
    """The parts of every map's Affine that there are, in the order of `parameter_gradients`."""
    return [t for m in maps for p in PARTS if (t := m.part(p)) is not None]


def forward(
    maps: Sequence[Map], x: Tensor, outs: Sequence[Tensor], arena: Arena, *, onto: Tensor | None = None
) -> Kept:
    """Fill `outs[i]`, `[n, out_i]`, with map i at x [n, in], plus `onto` where it is given; outs may be strided."""
    factors = [a for m in maps if (a := m.part("A")) is not None]
    a = u = None
    if factors:
        a = (factors[0] if len(factors) == 1 else torch.cat(factors)).to(x.dtype)
        u = arena.keep(x.shape[0], a.shape[0], like=x)
        thin_back(x, a.T, None, out=u)
    bs = tuple(None if (b := m.part("B")) is None else b.to(x.dtype) for m in maps)
    bands: list[Band] = []
    first = 0
    with arena.scratch():
        for m, b, out in zip(maps, bs, outs, strict=True):
            in_gain = m.part("in_gain")
            source = x if in_gain is None else torch.addcmul(x, x, _less_one(in_gain, x), out=_lent(x, arena))
            terms = [Term(source, Frozen(m.weight))]
            if u is not None and b is not None and m.affine is not None:
                terms.insert(0, Term(u[:, first : first + m.rank], b.T, m.affine.scale))
                first += m.rank
            bands.append(Band(out, terms, m.whole_bias, onto if m.part("out_gain") is None else None))
        products(bands, arena)
    kept: list[Tensor | None] = []
    for m, out in zip(maps, outs, strict=True):
        kept.append(_gain(out, m.part("out_gain"), m.whole_bias, arena))
        if onto is not None and kept[-1] is not None:
            out += onto
    return Kept(u, a, bs, tuple(kept))


def _gain(out: Tensor, gain: Tensor | None, bias: Tensor | None, arena: Arena) -> Tensor | None:
    """out = t + d (t - b) in place; t, kept aside."""
    if gain is None:
        return None
    t = arena.keep(*out.shape, like=out).copy_(out)
    d = _less_one(gain, out)
    out.addcmul_(t, d)
    if bias is not None:
        out -= d * bias.to(out.dtype)
    return t


def _less_one(gain: Tensor, x: Tensor) -> Tensor:
    """gain - 1, rounded to x's dtype: bfloat16 has no number between 1 and 1.0078, and a gain of 1 changes no bit."""
    return (gain - 1).to(x.dtype)


def _lent(x: Tensor, arena: Arena) -> Tensor:
    return arena.borrow(*x.shape, like=x)


def input_gradient(
    maps: Sequence[Map], kept: Kept, grads: Sequence[Tensor], dx: Tensor | None, arena: Arena, *, add: bool = False
) -> Inner:
    """Fill dx [n, in] (or add to it) with dL/dx, from grads[i] = dL/dy_i [n, out_i]; dx None: nobody wants it.

    What is returned is borrowed from the arena: the caller has opened `scratch`.
    """
    n, like = grads[0].shape[0], grads[0]
    total = sum(m.rank for m in maps)
    h = arena.borrow(n, total, like=like) if total else None
    sums: list[Tensor | None] = []
    before: list[Tensor | None] = []
    terms: list[Term] = []
    first = 0
    for m, b, big in zip(maps, kept.b, grads, strict=True):
        gain, in_gain = m.part("out_gain"), m.part("in_gain")
        g = big if gain is None else torch.addcmul(big, big, _less_one(gain, big), out=_lent(big, arena))
        of_b = None
        if h is not None and b is not None and m.affine is not None:
            end = first + m.rank
            trains = m.affine.B is not None and m.affine.B.requires_grad
            u = kept.u[:, first:end] if kept.u is not None and trains else None
            of_b = thin_back(g, b, u, scale=m.affine.scale, out=h[:, first:end])
            first = end
        sums.append(of_b)
        before.append(None)
        if in_gain is None:
            terms.append(Term(g, Frozen(m.weight, back=True)))
            continue
        before[-1] = product = arena.borrow(n, m.weight.in_features, like=like)
        products([Band(product, [Term(g, Frozen(m.weight, back=True))])], arena)
        if dx is not None:
            gain = in_gain.to(g.dtype)
            if add:
                dx.add_(torch.mul(product, gain, out=_lent(product, arena)))
            else:
                torch.mul(product, gain, out=dx)
            add = True
    if h is not None and kept.a is not None:
        terms.insert(0, Term(h, kept.a))
    if dx is not None and terms:
        products([Band(dx, terms, onto=dx if add else None)], arena)
    return Inner(h, tuple(sums), tuple(before))


def parameter_gradients(
    maps: Sequence[Map], kept: Kept, inner: Inner, grads: Sequence[Tensor], x: Tensor, arena: Arena
) -> list[Tensor | None]:
    """dL/d of each of `parameters(maps)`, None where it is not trained; x [n, in] as the forward had it."""
    trained = any(t.requires_grad for m in maps if (t := m.part("A")) is not None)
    stacked = thin_back(x, None, inner.h) if inner.h is not None and trained else None
    found: list[Tensor | None] = []
    first = 0
    for i, m in enumerate(maps):
        big, of_b = grads[i], inner.of_b[i]
        made: dict[str, Tensor] = {}
        if m.affine is not None and m.affine.A is not None and m.affine.B is not None:
            end = first + m.rank
            if stacked is not None:
                made["A"] = stacked[first:end]
            if of_b is not None:
                made["B"] = of_b.T * m.affine.scale
            first = end
        t, product = kept.before_gain[i], inner.before_in_gain[i]
        if t is not None:
            b = m.whole_bias
            made["out_gain"] = _row_sum(arena, big, t, b)
        if product is not None:
            made["in_gain"] = _row_sum(arena, product, x)
        if m.part("bias") is not None:
            made["bias"] = _row_sum(arena, big)
        found += [made[p].to(t.dtype) if t.requires_grad else None for p in PARTS if (t := m.part(p)) is not None]
    return found


def _row_sum(arena: Arena, x: Tensor, by: Tensor | None = None, less: Tensor | None = None) -> Tensor:
    """The sum of the rows of x, or of x (by - less), in float32 at least; a few at a time, in borrowed memory."""
    total = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    rows = min(_ROWS, len(x))
    with arena.scratch():
        wide, other = (arena.borrow(rows, x.shape[1], like=x, dtype=total.dtype) for _ in range(2))
        for at in rounds(len(x), _ROWS):
            n = at.stop - at.start
            part = wide[:n].copy_(x[at])
            if by is not None:
                factor = other[:n].copy_(by[at])  # PyTorch would widen it in memory of its own
                part.mul_(factor if less is None else factor.sub_(less.to(total.dtype)))
            total += part.sum(0)
    return total
