"""A picture: its words, its controls, and the function that computes its numbers and data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from deltaw.lab.base import Lab
from deltaw.lab.controls import Controls, drawn

Plain = dict[str, Any]
"""Plain JSON data: {"numbers": [...], "data": {...}}."""


@dataclass(frozen=True)
class Words:
    """What a picture says.

    notice         one sentence on what to look at
    formula        the formula behind it
    misconception  what people believe before they have seen it
    cure           what is true instead
    question       to check oneself, with its `answer`
    """

    title: str
    notice: str
    formula: str
    misconception: str
    cure: str
    question: str
    answer: str


@dataclass(frozen=True)
class Picture:
    """One picture of a lab.

    compute  (lab, controls) -> {"numbers", "data"}; pure but for the lab's cache
    act      the same where something is changed first (a training step, an answer); None: nothing is
    soon     the same within a moment, as far as it is there: data.pending names what is still made, and whoever wants
             that asks again; None: `compute` takes no longer
    """

    number: int
    words: Words
    controls: type[Controls]
    compute: Callable[[Lab, Any], Plain]
    act: Callable[[Lab, Any], Plain] | None = None
    soon: Callable[[Lab, Any], Plain] | None = None

    def plain(self) -> Plain:
        """What the page needs to draw the frame of the picture."""
        return {
            "number": self.number,
            **asdict(self.words),
            "controls": drawn(self.controls),
            "acts": self.act is not None,
        }


def number(key: str, label: str, value: float | int | str | bool, shown: str | None = None) -> Plain:
    """A number that the page shows: its value, and the text of it (whole numbers with commas)."""
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return {"key": key, "label": label, "value": value, "shown": text if shown is None else shown}


def percent(value: float, digits: int = 2) -> str:
    """A share as the page shows it: 0.00390625 -> "0.39 %"."""
    return f"{100 * value:.{digits}f} %"


def grid(values: Tensor, limit: float) -> Plain:
    """A matrix [rows, columns] as a heat map: whole numbers from -127 to 127, where 127 stands for `limit`."""
    scaled = (values.double() / (limit or 1.0) * 127).round().clamp(-127, 127)
    return {
        "rows": values.shape[0],
        "columns": values.shape[1],
        "limit": float(limit),
        "cells": [int(v) for v in scaled.flatten().tolist()],
    }


def rounded(values: Tensor) -> list[float]:
    """A vector with six significant digits: enough to draw."""
    return [float(f"{v:.6g}") for v in values.double().tolist()]
