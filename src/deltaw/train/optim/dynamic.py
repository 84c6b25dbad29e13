"""Optimizer states in 8 bits: the dynamic maps, and codes for blocks of 256 values.

    value[i] = table[code[i]] * absmax[i // 256]

Source: 8-bit optimizers (arXiv:2110.02861), sections 1.3 and 2.1. The tables are bitsandbytes' and the code is that
of the nearest level, as bitsandbytes' CUDA kernel finds it. Its float32 CPU code looks values up in 65,536 cells over
[-1, 1] instead, which makes 0 into 2e-5 of the block's largest value; an element without gradients would drift.
Both are compared in tests/train/test_train_states8.py.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
"""Values that share one absmax."""

_CELLS = 65536  # a float32's upper 16 bits: its sign, exponent and first 7 bits of the fraction


def dynamic_table(signed: bool) -> Tensor:
    """The levels of the dynamic 8-bit map, ascending: [256] float32 in [-1, 1], or in [0, 1].

    Seven decades below 1; each has twice the levels of the one below it, spaced evenly; and 0 and 1.
    Source: arXiv:2110.02861 section 1.3; bitsandbytes.functional.create_dynamic_map.
    """
    values: list[float] = [0.0, 1.0]
    for decade in range(7):
        n_levels = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, n_levels + 1, dtype=torch.float32)
        means = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + ((-means).tolist() if signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


class Scratch:
    """Reused buffers for `room` values: x2 float32, one int32."""

    def __init__(self, room: int) -> None:
        self.scaled = torch.empty(room, dtype=torch.float32)
        self.bounds = torch.empty(room, dtype=torch.float32)
        self.cells = torch.empty(room, dtype=torch.int32)

    bytes_per_value = 13
    """Bytes for each value of room; 1 is for the mask of a comparison."""


class DynamicMap:
    """Codes and values of one dynamic map.

    A search among 255 bounds costs 32 ns a value. Here the upper half of a float's bits names a cell that holds at
    most one bound, so two look-ups and one comparison give the same code in 2 ns.
    """

    def __init__(self, signed: bool) -> None:
        self.table = dynamic_table(signed)
        bounds = (self.table[:-1] + self.table[1:]) / 2
        upper = torch.arange(-_CELLS // 2, _CELLS // 2, dtype=torch.int32) << 16  # sign bit first: negative values
        ends = torch.stack([upper, upper | 0xFFFF]).view(torch.float32)
        low, high = torch.bucketize(ends.amin(0), bounds), torch.bucketize(ends.amax(0), bounds)
        assert int((high - low)[ends.isfinite().all(0)].amax()) == 1  # a cell holds one bound at most
        self._lowest = low.to(torch.uint8)
        self._bound = torch.cat([bounds, torch.tensor([torch.inf], dtype=torch.float32)])[low]

    def quantise(self, x: Tensor, codes: Tensor, absmax: Tensor, scratch: Scratch) -> None:
        """Write the nearest code of each of `x`, and each block's absmax.

        x         [n] float32, finite, n at most the scratch's room; a multiple of 256 or the end of a parameter
        codes     [n] uint8, absmax [ceil(n / 256)] float32: written
        A value half-way between two levels takes the lower one.
        """
        n = x.numel()
        scaled, bounds, cells = scratch.scaled[:n], scratch.bounds[:n], scratch.cells[:n]
        for part, into, largest in _blocks(x, scaled, absmax):
            torch.amax(torch.abs(part, out=into), 1, out=largest)
            torch.mul(part, largest.clamp(min=1e-38).reciprocal_()[:, None], out=into)
        torch.bitwise_right_shift(scaled.view(torch.int32), 16, out=cells)
        cells.add_(_CELLS // 2)
        torch.index_select(self._lowest, 0, cells, out=codes)
        torch.index_select(self._bound, 0, cells, out=bounds)
        codes.add_(torch.gt(scaled, bounds))

    def dequantise(self, codes: Tensor, absmax: Tensor, out: Tensor, scratch: Scratch) -> None:
        """Write table[code] * absmax of its block, in float32: codes [n], absmax [ceil(n / 256)], out [n]."""
        cells = scratch.cells[: codes.numel()]
        cells.copy_(codes)
        torch.index_select(self.table, 0, cells, out=out)
        for part, into, largest in _blocks(out, out, absmax):
            torch.mul(part, largest[:, None], out=into)


@cache
def dynamic_map(signed: bool) -> DynamicMap:
    """The one map of each kind: nothing changes it, and making it takes longer than most plans."""
    return DynamicMap(signed)


def _blocks(x: Tensor, out: Tensor, absmax: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The whole blocks as rows, then the short last one: (of x, of out, their absmax)."""
    full = x.numel() // BLOCK * BLOCK
    n = full // BLOCK
    parts = [(x[:full].view(-1, BLOCK), out[:full].view(-1, BLOCK), absmax[:n])] if n else []
    return [*parts, (x[full:][None], out[full:][None], absmax[n:])] if full < x.numel() else parts
