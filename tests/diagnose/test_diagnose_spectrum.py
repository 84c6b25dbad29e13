"""Singular values of updates against dense ones, and what is read from spectra that are known."""

from __future__ import annotations

import math

import pytest
import torch

from deltaw.diagnose.spectrum import dense_values, factor_values, summarise


def with_values(values: list[float], n: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors A [r, m] and B [n, r] whose product has these singular values; the factors themselves are skewed."""
    rng = torch.Generator().manual_seed(seed)
    r = len(values)
    u = torch.linalg.qr(torch.randn(n, r, generator=rng, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(m, r, generator=rng, dtype=torch.float64)).Q
    mix = torch.randn(r, r, generator=rng, dtype=torch.float64) + 3 * torch.eye(r)
    return torch.linalg.solve(mix, torch.diag(torch.tensor(values, dtype=torch.float64)) @ v.T), u @ mix


@pytest.mark.parametrize(("n", "m", "r"), [(30, 17, 4), (17, 30, 4), (12, 9, 11), (5, 40, 1)])
def test_diagnose_spectrum_of_factors_is_that_of_the_dense_update(n, m, r):
    rng = torch.Generator().manual_seed(3)
    A, B = torch.randn(r, m, generator=rng), torch.randn(n, r, generator=rng)
    wanted = torch.linalg.svdvals(-1.7 * B.double() @ A.double())[: min(r, n, m)]
    assert torch.allclose(factor_values(A, B, -1.7), wanted, rtol=1e-12)
    assert torch.allclose(dense_values(-1.7 * B @ A)[: min(r, n, m)], wanted, rtol=1e-5)


def test_diagnose_spectrum_reads_known_values():
    A, B = with_values([4.0, 2.0, 1.0, 0.5], 23, 19)
    found = summarise(factor_values(A, B, 0.5))
    assert found.values == pytest.approx([2.0, 1.0, 0.5, 0.25])
    assert found.norm == pytest.approx(math.sqrt(4 + 1 + 0.25 + 0.0625))
    assert (found.rank_90, found.rank_99, found.given) == (2, 4, 4)  # 4, 5, 5.25 and 5.3125 of 5.3125
    assert found.stable_rank == pytest.approx(5.3125 / 4)
    assert found.last == pytest.approx(0.125)


def test_diagnose_spectrum_flat_low_and_zero():
    flat = summarise(factor_values(*with_values([3.0] * 6, 20, 31), 1.0))
    assert (flat.rank_90, flat.rank_99, flat.last) == (6, 6, pytest.approx(1.0))
    assert flat.stable_rank == pytest.approx(6)
    low = summarise(factor_values(*with_values([3.0, 0.0, 0.0], 20, 31), 1.0))
    assert (low.rank_90, low.rank_99, low.last, low.stable_rank) == (1, 1, 0.0, pytest.approx(1))
    zero = summarise(factor_values(torch.randn(3, 8), torch.zeros(5, 3), 2.0))
    assert (zero.norm, zero.rank_99, zero.stable_rank, zero.given) == (0.0, 0, 0.0, 3)
    with pytest.raises(ValueError, match="one singular value"):
        summarise(torch.zeros(0))
