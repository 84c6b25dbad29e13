"""Singular values of a trained update, and what they say of the rank that it uses.

    dW = s * B A        B [out, r], A [r, in]
    B = Q_b R_b,  A^T = Q_a R_a        thin QR
    singular values of dW = those of s * R_b R_a^T, an r x r matrix (Golub and Van Loan, Matrix Computations, 5.4)

so dW [out, in] itself is never made. Sums are in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXACT = 1e-9
"""Of the largest singular value: what is smaller is rounding, not rank."""


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one update and what follows from them.

    values       largest first; as many as the update was given ranks (of a dense update: as many as it has sides)
    norm         Frobenius norm: the root of the sum of squares
    rank_90, rank_99  how many values hold 90 % and 99 % of the energy (the sum of squares); 0 for a zero update
    stable_rank  energy over the largest value's square (Rudelson and Vershynin 2007): r when flat, 1 when one rules
    last         the smallest given value over the largest: near 1 is a spectrum that ends while it is still flat
    """

    values: tuple[float, ...]
    norm: float
    rank_90: int
    rank_99: int
    stable_rank: float
    last: float

    @property
    def given(self) -> int:
        """The rank that the update was given."""
        return len(self.values)


def factor_values(A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Singular values of `scale * B A`, largest first, float64 [r]. A [r, in], B [out, r]; both finite.

    Ranks beyond the smaller side of the matrix are left out: they cannot be used.
    """
    r_a = torch.linalg.qr(A.detach().double().T, mode="r").R
    r_b = torch.linalg.qr(B.detach().double(), mode="r").R
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.T) * abs(scale)
    return values[: min(B.shape[0], A.shape[1], A.shape[0])]


def dense_values(update: Tensor) -> Tensor:
    """Singular values of a dense update [out, in], largest first, float64 [min(out, in)].

    From the eigenvalues of the smaller Gram matrix: exact to about 1e-8 of the largest value, and enough for energy.
    """
    wide = update.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    values: Tensor = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)
    return values


def summarise(values: Tensor) -> Spectrum:
    """What singular values [r], largest first, say. Raises ValueError when there are none."""
    if values.numel() == 0:
        raise ValueError("a spectrum needs one singular value or more")
    found = [float(v) for v in values]
    top = found[0]
    kept = [v if v > EXACT * top else 0.0 for v in found]
    energy = [v * v for v in kept]
    total = math.fsum(energy)
    if total == 0:
        return Spectrum(tuple(kept), 0.0, 0, 0, 0.0, 0.0)
    return Spectrum(
        values=tuple(kept),
        norm=math.sqrt(total),
        rank_90=_holding(energy, 0.90),
        rank_99=_holding(energy, 0.99),
        stable_rank=total / energy[0],
        last=kept[-1] / top,
    )


def _holding(energy: list[float], share: float) -> int:
    """How many of the largest hold `share` of the sum."""
    wanted, so_far = share * math.fsum(energy), 0.0
    for n, value in enumerate(energy, 1):
        so_far += value
        if so_far >= wanted * (1 - 1e-12):
            return n
    return len(energy)
