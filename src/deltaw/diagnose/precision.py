"""What is left of an update once the merged weights are rounded to a number format.

d = W' - W                       the update in float32
e = round(W') - round(W)         what the merged model has over the rounded base

kept   = <e, d> / <d, d>         share of the update that points where it should: 1 is all of it
error  = |e - d|^2 / |d|^2       energy of the rounding against that of the update: 1 is as much noise as update
lost   = share of changed weights that round to what the base's weight rounds to
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import BadInput, near
from deltaw.formats import QUANTISED
from deltaw.model.quantised import Format

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Rounding = Callable[[Tensor], Tensor]
"""A weight [out, in] float32 -> what its rounded form stands for, float32."""


def rounding(name: str) -> Rounding:
    """How `name` rounds a weight: a dtype, or a quantised format as `Format` writes it ("nf4", "nf4+dq").

    Raises BadInput, with the near name, for anything else.
    """
    if name in DTYPES:
        dtype = DTYPES[name]
        return lambda w: w.to(dtype).float()
    how = Format.parse(name)
    if how is None:
        known = [*DTYPES, *QUANTISED]
        raise BadInput(f"no number format {name!r} to merge into.{near(name, known)} Known: {', '.join(known)}.")
    return lambda w: how.make(w.contiguous(), torch.float32).dense()


@dataclass(frozen=True)
class Rounded:
    """Sums over the weights of one place, or of all places; `a + b` is of both.

    n_changed  weights that the update changes in float32;  n_lost: of them, those that round to the base's value
    energy     |d|^2;  along: <e, d>;  wrong: |e - d|^2
    """

    n_changed: int = 0
    n_lost: int = 0
    energy: float = 0.0
    along: float = 0.0
    wrong: float = 0.0

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(
            self.n_changed + other.n_changed,
            self.n_lost + other.n_lost,
            self.energy + other.energy,
            self.along + other.along,
            self.wrong + other.wrong,
        )

    @property
    def kept(self) -> float:
        """Share of the update that is left, along itself."""
        return self.along / self.energy if self.energy else 1.0

    @property
    def error(self) -> float:
        """Energy of the rounding over that of the update."""
        return self.wrong / self.energy if self.energy else 0.0

    @property
    def lost(self) -> float:
        """Share of changed weights that are as if nothing had been merged."""
        return self.n_lost / self.n_changed if self.n_changed else 0.0


def rounded(before: Tensor, after: Tensor, how: Rounding) -> Rounded:
    """What rounding leaves of the update from `before` to `after`, both [out, in] float32."""
    was, now = how(before), how(after)
    return left_after(before, after, was, now)


def left_after(before: Tensor, after: Tensor, was: Tensor, now: Tensor) -> Rounded:
    """The same where both are rounded already: `was` is the rounded base, `now` the rounded sum."""
    d = (after - before).double()
    e = (now - was).double()
    changed = after != before
    return Rounded(
        n_changed=int(changed.sum()),
        n_lost=int((changed & (was == now)).sum()),
        energy=float((d * d).sum()),
        along=float((e * d).sum()),
        wrong=float(((e - d) ** 2).sum()),
    )
