"""What cutting changes to a lower rank lost, place by place and together: for the reports."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from deltaw.merge.factors import Cut


@dataclass(frozen=True)
class SiteCut:
    """One linear map of a written adapter: its rank, |dW|, and the relative error |dW - B A| / |dW| (Frobenius).

    rank_before  what the rank was, where it had one
    """

    site: str
    rank: int
    norm: float
    error: float
    rank_before: int | None = None


def together(cuts: Iterable[Cut]) -> float:
    """The relative error of all places as one: the root of the sum of squares lost by that of the squares there."""
    lost = size = 0.0
    for cut in cuts:
        lost += (cut.error * cut.norm) ** 2
        size += cut.norm**2
    return math.sqrt(lost / size) if size else 0.0
