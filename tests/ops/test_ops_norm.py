"""`row_norms` is the norm of the rows of the whole changed matrix, in every format and orientation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.formats import QUANTISED
from deltaw.formats.dense import DenseWeight
from deltaw.merge.checkpoint import StoredWeight
from deltaw.ops import norm
from deltaw.ops.norm import row_norms, row_squares

IN, OUT, RANK, SCALE = 24, 40, 3, 5 / 3
EPS = {torch.float32: 2**-23, torch.float64: 2**-52}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(size: float = 1.0) -> tuple[Tensor, Tensor]:
    return noise(RANK, IN, seed=1) / IN**0.5, size * noise(OUT, RANK, seed=2)


def weight(dtype: torch.dtype, transposed: bool = False) -> DenseWeight:
    w = (noise(OUT, IN, seed=3) / IN**0.5).to(dtype)
    return DenseWeight(w.T.contiguous() if transposed else w, transposed)


def exact(w: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """The whole matrix in float64."""
    return (w.double() + SCALE * B.double() @ A.double()).norm(dim=1)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0.0, 0.01, 1.0, 100.0])
def test_it_is_the_norm_of_the_whole_matrix(size, dtype, transposed):
    A, B = (t.to(dtype) for t in factors(size))
    w = weight(dtype, transposed)
    got = row_norms(w, A, B, SCALE)
    assert got.dtype == dtype
    # the square is a sum of 24 + 3 * 24 + 9 products, none larger than the square itself by more than a few times
    torch.testing.assert_close(got.double(), exact(w.dense(dtype), A, B), rtol=16 * EPS[dtype], atol=0)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_in_bfloat16_only_the_product_with_w_is_rounded(size):
    A, B = (t.float() for t in factors(size))
    w = weight(torch.bfloat16)
    wanted = exact(w.dense(), A, B)
    got = row_norms(w, A, B, SCALE)
    assert got.dtype == torch.float32
    # A and W A^T are rounded by half of 2^-7: two times 2 s (W A^T) . B, against the square of the norm
    cross = 2 * SCALE * ((w.dense().double() @ A.double().T).abs() * B.double().abs()).sum(1)
    bound = 2 * 2**-8 * (cross + 2 * SCALE * w.dense().double().norm(dim=1) * (B.double().norm(dim=1))) / wanted
    assert bool(((got.double() - wanted).abs() <= bound / 2).all())
    torch.testing.assert_close(got.double(), wanted, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_change_it_is_the_norm_of_the_base_bit_for_bit(dtype):
    w = weight(dtype)
    A, B = factors()
    assert torch.equal(row_norms(w, A, torch.zeros_like(B), SCALE), row_norms(w, torch.zeros_like(A), B, SCALE))
    torch.testing.assert_close(
        row_norms(w, A, torch.zeros_like(B), SCALE).double(), w.dense().double().norm(dim=1), rtol=4 * 2**-23, atol=0
    )


@pytest.mark.parametrize("format", sorted(QUANTISED))
def test_a_quantised_matrix_has_the_norms_of_its_dequantised_one(format):
    w = QUANTISED[format].quantised(weight(torch.float32).stored, block=32, double_quant=True)
    A, B = (t.float() for t in factors())
    torch.testing.assert_close(row_norms(w, A, B, SCALE).double(), exact(w.dense(), A, B), rtol=16 * 2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_a_matrix_on_the_disk_has_the_norms_of_the_one_in_memory(dtype, transposed):
    held = weight(dtype, transposed)
    w = StoredWeight(tuple(held.stored.shape), transposed, lambda: held.stored)
    A, B = (t.float() for t in factors())
    assert torch.equal(w.row_squares(), held.row_squares())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = exact(held.dense(torch.float64), A, B)
    torch.testing.assert_close(row_norms(w, A, B, SCALE).double(), wanted, rtol=16 * EPS[wide], atol=0)


def test_a_change_that_cancels_the_base_stays_finite_and_small():
    A, B = (t.float() for t in factors())
    w = DenseWeight(-(SCALE * B @ A))
    got = row_norms(w, A, B, SCALE)
    assert bool((got > 0).all())
    # the rounding of the squares that cancel, as a norm
    assert bool((got <= (64 * 2**-23) ** 0.5 * w.stored.norm(dim=1)).all())


def test_a_row_of_zeros_has_a_norm_to_divide_by():
    A, B = (t.float() for t in factors())
    w = DenseWeight(torch.zeros(OUT, IN))
    nothing = row_norms(w, A, torch.zeros_like(B), SCALE)
    assert bool((nothing > 0).all())
    assert bool((nothing < 1e-18).all())
    torch.testing.assert_close(row_norms(w, A, B, SCALE).double(), exact(w.stored, A, B), rtol=16 * 2**-23, atol=0)


def test_it_has_no_gradient():
    A, B = (t.float().requires_grad_() for t in factors())
    assert not row_norms(weight(torch.float32), A, B, SCALE).requires_grad


def test_it_runs_without_memory():
    w = DenseWeight(torch.empty(OUT, IN, device="meta", dtype=torch.bfloat16))
    got = row_norms(w, torch.empty(RANK, IN, device="meta"), torch.empty(OUT, RANK, device="meta"), SCALE)
    assert got.shape == (OUT,)
    assert got.is_meta
    assert got.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_row_squares_are_those_of_the_rows_whatever_part_is_widened_at_a_time(monkeypatch, dtype, transposed):
    w = weight(dtype, transposed)
    whole = row_squares(w.parts(dtype), w.out_features)
    monkeypatch.setattr(norm, "_VALUES", 7 * IN + 5)  # seven rows at a time: the last part is smaller
    assert len(list(w.parts(dtype))) > 2
    assert torch.equal(row_squares(w.parts(dtype), w.out_features), whole)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert whole.dtype == wide
    torch.testing.assert_close(whole.double(), w.dense(torch.float64).square().sum(1), rtol=8 * EPS[wide], atol=0)


@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_a_weight_keeps_its_row_squares_until_it_is_moved(format):
    dense = weight(torch.float32).stored
    w = DenseWeight(dense) if format == "dense" else QUANTISED[format].quantised(dense, block=32)
    first = w.row_squares()
    assert w.row_squares() is first
    w.to(torch.float64 if format == "dense" else "cpu")  # the constants of a quantised matrix are float32
    assert w.row_squares() is not first
    torch.testing.assert_close(w.row_squares().double(), first.double(), rtol=8 * 2**-23, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("format", ["dense", "conv1d", *QUANTISED])
@pytest.mark.parametrize("width", [40, 37])
def test_the_parts_of_a_weight_are_its_rows(monkeypatch, format, dtype, width):
    torch.manual_seed(0)
    dense = torch.randn(23, width)
    plain = {"dense": lambda: DenseWeight(dense), "conv1d": lambda: DenseWeight(dense.T.contiguous(), True)}
    w = plain[format]() if format in plain else QUANTISED[format].quantised(dense, block=32)
    monkeypatch.setattr(norm, "_VALUES", 5 * width + 3)
    parts = list(w.parts(dtype))
    assert [len(part) for part in parts] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat(parts), w.dense(dtype))
