"""What is wrong with the parameters of an adapter, as sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deltaw.core.spec import Params


def misfits(
    where: str, wanted: Mapping[str, tuple[int, ...]], params: Params, needs: str = "this model needs"
) -> list[str]:
    """What is missing, left over or misshapen in the parameters of one place; `wanted`: their shapes."""
    problems = []
    if missing := [p for p in wanted if p not in params]:
        problems.append(f"{where} lacks {', '.join(missing)}")
    if extra := [p for p in params if p not in wanted]:
        problems.append(f"{where} has {', '.join(extra)}, which its settings do not ask for")
    for p, shape in wanted.items():
        if p in params and tuple(params[p].shape) != tuple(shape):
            problems.append(f"{where}:{p} has shape {tuple(params[p].shape)}, {needs} {tuple(shape)}")
    return problems


def broken(where: str, params: Params) -> list[str]:
    """Which parameters of one place hold NaN or Inf, as a sentence; none: nothing."""
    bad = not_finite(params)
    return [f"{where} holds NaN or Inf in {', '.join(bad)}"] if bad else []


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold NaN or Inf."""
    return [name for name, tensor in tensors.items() if not is_finite(tensor)]


def is_finite(t: Tensor) -> bool:
    """Whether all values are; a sum that is says so in a third of the time, one that is not may only be large."""
    return math.isfinite(float(t.detach().sum())) or bool(torch.isfinite(t).all())


def some(found: Sequence[str], most: int = 4, between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return between.join(found[:most]) + more
