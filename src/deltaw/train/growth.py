"""How large a change has grown: the norm of dW over the norm of W, over all linear maps that an adapter sits on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.core.affine import Affine, merged
from deltaw.core.site import LinearSite
from deltaw.core.weight import Weight
from deltaw.model.model import Model
from deltaw.ops.norm import row_ranges

TIMES = 20
"""About so often in a run it is measured."""


def growth_due(step: int, n_steps: int) -> bool:
    """Whether it is measured after `step` (from 1): at the first, the last, and about TIMES evenly between."""
    return step in (1, n_steps) or step % math.ceil(n_steps / TIMES) == 0


@torch.no_grad()
def growth(model: Model) -> float | None:
    """sqrt(sum |dW|^2) / sqrt(sum |W|^2), Frobenius norms, over the linear maps that what trains changes.

    Biases do not count. None where no linear map is changed: tokens in front, bottlenecks, and method `full`, whose
    own start is not kept.
    """
    changed = whole = 0.0
    for attachment in model.adapters.values():
        for name, place in attachment.places.items():
            if not isinstance(place, LinearSite):
                continue
            form = attachment.lowered(name, model.places)
            if not isinstance(form, Affine) or (form.A is None and form.is_low_rank_only):
                continue  # only its bias trains
            weight = model.places.weights[place.name]
            changed += change_squared(form, weight)
            whole += float(weight.row_squares().double().sum())
    return math.sqrt(changed / whole) if whole > 0 else None


def change_squared(form: Affine, weight: Weight) -> float:
    """|dW|^2, Frobenius, of a change with A and B or gains, without making dW where no input is scaled.

    With g = out_gain, row i of dW is g_i (W_i + s B_i A) - W_i, so its square is
    (g_i - 1)^2 |W_i|^2 + 2 g_i (g_i - 1) s B_i (A W_i) + g_i^2 s^2 B_i (A A^T) B_i^T.
    """
    if form.in_gain is not None:
        return sum(
            float((merged(_rows_of(form, first, last), W)[0] - W).square_().sum(dtype=torch.float64))
            for (first, last), W in zip(
                row_ranges(weight.out_features, weight.in_features), weight.parts(), strict=True
            )
        )
    n = weight.out_features
    squares = across = torch.zeros(n, dtype=torch.float64, device=weight.row_squares().device)
    if form.A is not None and form.B is not None:
        A, B = form.A.double(), form.B.double()
        squares = form.scale**2 * ((B @ (A @ A.T)) * B).sum(1)
        if form.out_gain is not None:
            seen: Tensor = weight.mul(form.A.to(weight.dtype)).double()  # [r, out]
            across = form.scale * (B * seen.T).sum(1)
    if form.out_gain is None:
        return max(0.0, float(squares.sum()))
    g = form.out_gain.double()
    rows = (g - 1).square() * weight.row_squares().double() + 2 * g * (g - 1) * across + g.square() * squares
    return max(0.0, float(rows.sum()))


def _rows_of(form: Affine, first: int, last: int) -> Affine:
    """What a change does to some rows of W, its bias left out."""
    B, gain = (None if part is None else part[first:last] for part in (form.B, form.out_gain))
    return Affine(form.A, B, form.scale, gain, form.in_gain)
