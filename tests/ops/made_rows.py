"""What the tests of the elementwise ops share: rows inside wider buffers, and how close a result must be."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


def rows(shape: tuple[int, ...], seed: int, dtype: torch.dtype, beside: int = 3) -> Tensor:
    """Normal values [n, d] or [n, h, d] inside a buffer that holds `beside` more values before and after each row."""
    rng = torch.Generator().manual_seed(seed)
    wide = 2 * torch.randn(shape[0], math.prod(shape[1:]) + 2 * beside, generator=rng)
    inner = wide.to(dtype)[:, beside : wide.shape[1] - beside]
    return inner.unflatten(1, shape[1:]) if len(shape) == 3 else inner


def assert_rounded_once(got: Tensor, wanted: Tensor, room: float = 1e-6) -> None:
    """`got` is `wanted` float64, found in float32 (`room` of the value and of the largest one) and rounded once.

    Half a unit in the last place of a bfloat16 number is at most 2^-8 of it.
    """
    assert wanted.dtype == torch.float64
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    rtol = room + (2**-8 if got.dtype == torch.bfloat16 else 0.0)
    torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=room * largest, equal_nan=True)
