"""Quantisation the slow way: every value against every level, in float64; nothing here comes from deltaw."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

NAMES = ("nf4", "fp4", "int4", "int8")
_NF4 = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
]  # fmt: skip
_FP4 = [0, 0.0625, 8, 12, 4, 6, 2, 3]
LEVELS = {
    "nf4": torch.tensor(_NF4, dtype=torch.float64),
    "fp4": torch.tensor([*_FP4, *(-x for x in _FP4)], dtype=torch.float64) / 12,
    "int4": torch.arange(-7, 8, dtype=torch.float64) / 7,
    "int8": torch.arange(-127, 128, dtype=torch.float64) / 127,
}
BITS = {"nf4": 4, "fp4": 4, "int4": 4, "int8": 8}


def dynamic_levels() -> Tensor:
    """The signed dynamic 8-bit map: a sign, up to six zeros after the point, the rest of the bits linear."""
    found = [0.0, 1.0]
    for zeros in range(7):
        n = 2 ** (6 - zeros)
        edges = [0.1 + 0.9 * i / n for i in range(n + 1)]
        for low, high in itertools.pairwise(edges):
            value = 10.0**-zeros * (low + high) / 2
            found += [value, -value]
    return torch.tensor(sorted(found), dtype=torch.float64)


def blocks_of(w: Tensor, block: int) -> list[Tensor]:
    """The values of w [out, in] row by row, `block` at a time; the last may be short."""
    return list(w.double().reshape(-1).split(block))


def absmax_of(w: Tensor, block: int) -> Tensor:
    return torch.stack([b.abs().max() for b in blocks_of(w, block)]).float()


def nearest(w: Tensor, name: str, block: int, scales: Tensor) -> Tensor:
    """The level nearest to each value's part of its block's absmax, times the block's entry of `scales`."""
    levels, found = LEVELS[name], []
    for values, scale in zip(blocks_of(w, block), scales, strict=True):
        largest = values.abs().max()
        part = values / largest if largest > 0 else values
        chosen = levels[(part[:, None] - levels).abs().argmin(1)]
        found.append(chosen.float() * scale)
    return torch.cat(found).reshape(w.shape)


def worst_gap(name: str) -> float:
    """Half the widest gap between neighbouring levels: how far off a value of absmax 1 can be."""
    return float(LEVELS[name].sort().values.diff().max()) / 2
