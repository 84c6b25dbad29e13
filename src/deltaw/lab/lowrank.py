"""Pictures 1, 6, 7 and 13: what a product of two thin matrices can say.

dW = B A        A [r, in], B [out, r]: r (in + out) numbers
|W - W_r|       the best rank-r approximation keeps the r largest singular values; its error is the root of the sum
                of squares of the others (Eckart and Young, 1936): merge/factors.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from deltaw.core.affine import Affine, merged
from deltaw.core.spec import Start
from deltaw.diagnose.spectrum import dense_values, summarise
from deltaw.errors import BadInput
from deltaw.lab.base import PROMPT, Lab
from deltaw.lab.controls import Controls, choice, controls, fraction, slider, switch
from deltaw.lab.picture import Plain, grid, number, percent, rounded
from deltaw.merge.factors import Cut, Keep, cut_dense, tails
from deltaw.methods import Lora
from deltaw.ops.affine import apply

SIDE = 64
"""Rows and columns of a heat map."""
FULL_COLOUR = 0.98
"""The share of a heat map's numbers that its colours tell apart; the others have full colour."""
FALL = 0.8
"""Of picture 1's made update: each singular value over the one before."""
CURVE_POINTS = 120


def first_rank(cut: Cut, rank: int) -> tuple[Tensor, Tensor]:
    """(A, B) of the best approximation of `rank`, from a whole decomposition."""
    return cut.A[:rank], cut.B[:, :rank]


def singular_values(cut: Cut) -> Tensor:
    """The singular values of a whole decomposition, largest first: each row of A is sqrt(s) v."""
    return cut.A.double().square().sum(1)


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def spread(values: Tensor) -> float:
    """The size that FULL_COLOUR of the values stay under."""
    return float(values.abs().flatten().quantile(FULL_COLOUR))


def target_controls(lab: Lab, role: str, layer: int) -> dict[str, Any]:
    """The controls that choose a linear map of the base."""
    roles = lab.roles
    return {
        "layer": slider(min(layer, lab.layers - 1), 0, lab.layers - 1, "layer"),
        "target": choice(role if role in roles else roles[0], roles, "matrix"),
    }


# 1: low-rank decomposition ---------------------------------------------------------------------------


def decomposition_controls(lab: Lab) -> type[Controls]:
    """Rank of the adapter; which matrix of the base."""
    return controls(
        "Picture1", rank=slider(8, 1, SIDE, "rank r", (1, 2, 4, 8, 16, 32, 64)), **target_controls(lab, "q_proj", 0)
    )


def made_update(side: int) -> Tensor:
    """A made change [side, side] of norm 1: random directions, singular values that fall by FALL from each to the next.

    Trained updates fall so: few directions carry most of them (arXiv:2106.09685 section 7.2).
    """
    U = torch.linalg.qr(normal(side, side, seed=1).double()).Q
    V = torch.linalg.qr(normal(side, side, seed=2).double()).Q
    S = FALL ** torch.arange(side, dtype=torch.float64)
    made: Tensor = U @ torch.diag(S / S.norm()) @ V.T
    return made


def decomposition(lab: Lab, c: Any) -> Plain:
    """W0 (a corner of a real matrix), the change, its best B A of the rank asked for, and W0 + B A."""
    W = lab.weight(c.layer, c.target)[:SIDE, :SIDE]
    side = min(W.shape)
    wanted = made_update(side).float() * float(W.norm()) / 2
    if c.rank > side:
        raise BadInput(f"{c.target} has at most {side} directions here, and rank is {c.rank}.")
    whole = cut_dense(wanted, Keep(), "the made change")
    A, B = first_rank(whole, c.rank)
    W = W[:side, :side]
    after, _ = merged(Affine(A, B), W)
    limit = max(spread(W), spread(after))
    values = B @ A
    error = float((wanted - values).double().norm() / wanted.double().norm())
    parameters = A.numel() + B.numel()
    return {
        "numbers": [
            number("parameters", "numbers in A and B", parameters),
            number("full", "numbers in dW", wanted.numel()),
            number("share", "share", parameters / wanted.numel(), percent(parameters / wanted.numel(), 1)),
            number("error", "error of B A", error, percent(error)),
        ],
        "data": {
            "grids": [
                {"title": f"W0: block {c.layer}, {c.target}", **grid(W, limit)},
                {"title": "dW: wanted", **grid(wanted, spread(wanted))},
                {"title": f"B A: rank {c.rank}", **grid(values, spread(wanted))},
                {"title": "W0 + B A", **grid(after, limit)},
            ],
            "A": list(A.shape),
            "B": list(B.shape),
        },
    }


# 6: a few directions ------------------------------------------------------------------------------------


def directions_controls(lab: Lab) -> type[Controls]:
    """Which matrix of the base, and how many directions of it are kept."""
    most = max(min(s.in_features, s.out_features) for s in lab.linear.values())
    marks = [r for r in (1, 4, 16, 64, 128, 256, 512) if r <= most]
    return controls(
        "Picture6", rank=slider(min(16, most), 1, most, "rank r", marks), **target_controls(lab, "up_proj", 5)
    )


def noise_values(lab: Lab, out: int, n_in: int) -> Tensor:
    """The singular values of noise [out, n_in]."""
    return lab.keep(("noise", out, n_in), lambda: dense_values(normal(out, n_in, seed=3)))


def directions(lab: Lab, c: Any) -> Plain:
    """A real matrix beside its best approximation of a rank, and the error at every rank, also of noise."""
    W = lab.weight(c.layer, c.target)
    side = min(W.shape)
    if c.rank > side:
        raise BadInput(f"{c.target} of block {c.layer} has at most {side} directions, and rank is {c.rank}.")
    found = lab.directions(c.layer, c.target)
    A, B = found.factors(W, c.rank)
    near = B @ A
    missing = W - near
    S = found.values
    tail = tails(S)
    noise = noise_values(lab, *W.shape)
    update = FALL ** torch.arange(side, dtype=torch.float64)
    error = float(vector_norm(missing, dtype=torch.float64) / vector_norm(W, dtype=torch.float64))
    at = sorted({*range(0, side + 1, max(1, side // CURVE_POINTS)), c.rank, side})
    curves = {"this matrix": tail / tail[0], "noise": tails(noise) / tails(noise)[0]}
    curves["a change whose values fall by a fifth"] = tails(update) / tails(update)[0]
    limit = spread(W[:SIDE, :SIDE])
    return {
        "numbers": [
            number("error", "error, measured", error, percent(error)),
            number(
                "tail",
                "error by the values left out",
                float(tail[c.rank] / tail[0]),
                percent(float(tail[c.rank] / tail[0])),
            ),
            number("parameters", "numbers in B A", A.numel() + B.numel()),
            number("full", "numbers in W", W.numel()),
            number("rank_90", "directions that hold 90 %", summarise(S).rank_90),
            number("noise_90", "of noise of this shape", summarise(noise).rank_90),
        ],
        "data": {
            "grids": [
                {"title": f"W: block {c.layer}, {c.target} (corner)", **grid(W[:SIDE, :SIDE], limit)},
                {"title": f"best of rank {c.rank}", **grid(near[:SIDE, :SIDE], limit)},
                {"title": "what is missing", **grid(missing[:SIDE, :SIDE], limit)},
            ],
            "curves": [{"name": name, "rank": at, "error": rounded(values[at])} for name, values in curves.items()],
            "rank": c.rank,
        },
    }


# 7: forward path ------------------------------------------------------------------------------------------


def forward_controls(lab: Lab) -> type[Controls]:
    """Rank, matrix, and whether B is still zero."""
    return controls(
        "Picture7",
        rank=slider(8, 1, 64, "rank r", (1, 4, 8, 16, 64)),
        trained=switch(True, "B is filled (off: as at the start)", (False, True)),
        **target_controls(lab, "q_proj", 0),
    )


def forward(lab: Lab, c: Any) -> Plain:
    """A real input on both paths: y = W x + scale B (A x)."""
    site, weight = lab.site(c.layer, c.target), lab.weight(c.layer, c.target)
    x = lab.inputs()[site.name]
    frozen = lab.model.places.weights[site.name]
    spec = Lora(rank=c.rank, alpha=2.0 * c.rank)
    params = spec.init(site, Start(rng=torch.Generator().manual_seed(4)))
    y = weight @ x
    if c.trained:  # a made B, so that the change is a third of y
        made = normal(*params["B"].shape, seed=5)
        reach = (spec.scale_at(site) * made @ (params["A"] @ x)).norm()
        params["B"] = made * (y.norm() / 3 / reach)
    form = spec.lower(site, params, frozen)
    z = params["A"] @ x
    change = form.scale * (params["B"] @ z)
    after, _ = merged(form, weight)
    both = apply(form, x.to(lab.model.net.dtype), frozen).float()
    extra = params["A"].numel() + params["B"].numel()
    differ = float((after @ x - y - change).norm() / (y + change).norm())
    return {
        "numbers": [
            number("frozen", "multiplications by W", weight.numel()),
            number("adapter", "multiplications by A and B", extra),
            number("share", "extra work", extra / weight.numel(), percent(extra / weight.numel())),
            number("base_norm", "|W x|", float(y.norm()), f"{float(y.norm()):.3f}"),
            number("change_norm", "|s B A x|", float(change.norm()), f"{float(change.norm()):.3f}"),
            number("merged", "|W' x - y| / |y|", differ, f"{differ:.1e}"),
        ],
        "data": {
            "prompt": PROMPT,
            "site": site.name,
            "dtype": str(lab.model.net.dtype).removeprefix("torch."),
            "vectors": {
                "x": rounded(x), "Wx": rounded(y), "Ax": rounded(z), "BAx": rounded(change), "y": rounded(both)
            },
        },
    }  # fmt: skip


# 13: low-rank lab -------------------------------------------------------------------------------------------


def plateau_controls(lab: Lab) -> type[Controls]:
    """True rank of the target, rank of the adapter, and how much noise lies over the target."""
    return controls(
        "Picture13",
        true_rank=slider(8, 1, 32, "true rank", (2, 8, 16)),
        rank=slider(4, 1, SIDE, "LoRA rank r", (1, 2, 4, 8, 12, 16, 32, 64)),
        noise=fraction(0.0, 0.0, 0.5, 0.05, "noise over the target", (0.0, 0.2)),
    )


def plateau(lab: Lab, c: Any) -> Plain:
    """The error of the best B A at every rank: to what is seen, and to the truth under the noise."""
    truth = normal(SIDE, c.true_rank, seed=6).double() @ normal(c.true_rank, SIDE, seed=7).double()
    truth /= truth.norm()
    dust = normal(SIDE, SIDE, seed=8).double()
    seen = truth + c.noise * dust / dust.norm()
    whole = cut_dense(seen, Keep(), "the target")
    left = tails(singular_values(whole)) / seen.norm()
    A, B = (t.double() for t in first_rank(whole, SIDE))
    far = [float((truth - B[:, :r] @ A[:r]).norm()) for r in range(SIDE + 1)]
    exact = [r for r in range(SIDE + 1) if float(left[r]) < 1e-6]
    parameters = 2 * SIDE * c.rank
    numbers = [
        number("error", "error at this rank", float(left[c.rank]), percent(float(left[c.rank]))),
        number("to_truth", "distance to the truth", far[c.rank], percent(far[c.rank])),
        number("parameters", "numbers in A and B", parameters),
        number("full", "numbers in the target", SIDE * SIDE),
        number("best", "rank nearest to the truth", min(range(SIDE + 1), key=lambda r: (round(far[r], 6), r))),
    ]
    if exact:
        numbers.append(number("plateau", "the error is zero from rank", exact[0]))
    return {
        "numbers": numbers,
        "data": {
            "rank": c.rank,
            "true_rank": c.true_rank,
            "seen": rounded(left.where(left > 1e-6, 0.0)),
            "truth": [round(v, 6) for v in far],
            "limit": 1.0,
        },
    }
