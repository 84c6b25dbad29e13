"""`apply`, `apply_columns`, `delta` and `merged` are the same map: the dense one written out."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltaw.core.affine import Affine, check, detached, merged
from deltaw.errors import ShapeError, WorkFailed
from deltaw.formats.dense import DenseWeight
from deltaw.ops.affine import apply, apply_columns, delta

IN, OUT, RANK, SCALE = 24, 40, 3, 5 / 3
ATOL = 1e-12  # float64, dot products of at most 24 terms of order 1
PARTS = ("low_rank", "out_gain", "in_gain", "bias")
COMBINATIONS = [c for n in range(len(PARTS) + 1) for c in itertools.combinations(PARTS, n)]


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_affine(parts: tuple[str, ...]) -> Affine:
    return Affine(
        A=noise(RANK, IN, seed=1) if "low_rank" in parts else None,
        B=noise(OUT, RANK, seed=2) if "low_rank" in parts else None,
        scale=SCALE,
        out_gain=noise(OUT, seed=3) if "out_gain" in parts else None,
        in_gain=noise(IN, seed=4) if "in_gain" in parts else None,
        bias=noise(OUT, seed=5) if "bias" in parts else None,
    )


def make_weight(transposed: bool = False) -> DenseWeight:
    w = noise(OUT, IN, seed=6)
    return DenseWeight((w.T if transposed else w).contiguous(), transposed)


def oracle(affine: Affine, w: Tensor, base_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The formula of core/affine.py with matrices: diag(out_gain) (W diag(in_gain) + scale B A), bias."""
    w = w.clone()
    if affine.in_gain is not None:
        w = w @ torch.diag(affine.in_gain)
    if affine.A is not None:
        w = w + affine.scale * affine.B @ affine.A
    if affine.out_gain is not None:
        w = torch.diag(affine.out_gain) @ w
    bias = affine.bias if affine.bias is not None else base_bias
    return w, torch.zeros(OUT, dtype=w.dtype) if bias is None else bias


@pytest.fixture(params=COMBINATIONS, ids=lambda c: "+".join(c) or "nothing")
def affine(request) -> Affine:
    return make_affine(request.param)


@pytest.fixture(params=[False, True], ids=["linear", "conv1d"])
def weight(request) -> DenseWeight:
    return make_weight(request.param)


@pytest.fixture(params=[False, True], ids=["no base bias", "base bias"])
def base_bias(request) -> Tensor | None:
    return noise(OUT, seed=7) if request.param else None


def test_apply_equals_the_dense_map(affine, weight, base_bias):
    x = noise(2, 5, IN, seed=8)
    w, b = oracle(affine, weight.dense(torch.float64), base_bias)
    torch.testing.assert_close(apply(affine, x, weight, base_bias), x @ w.T + b, rtol=0, atol=ATOL)


def test_merged_equals_the_dense_map(affine, weight, base_bias):
    dense = weight.dense(torch.float64)
    before = dense.clone()
    w, b = oracle(affine, dense, base_bias)
    got_w, got_b = merged(affine, dense, base_bias)
    torch.testing.assert_close(got_w, w, rtol=0, atol=ATOL)
    torch.testing.assert_close(torch.zeros_like(b) if got_b is None else got_b, b, rtol=0, atol=ATOL)
    assert torch.equal(dense, before)


def test_delta_added_to_the_base_equals_the_dense_map(affine, weight, base_bias):
    x = noise(2, 5, IN, seed=8)
    base = weight.mul(x) if base_bias is None else weight.mul(x) + base_bias
    w, b = oracle(affine, weight.dense(torch.float64), base_bias)
    changed = base + delta(affine, x, weight, base, base_bias)
    torch.testing.assert_close(changed, x @ w.T + b, rtol=0, atol=ATOL)


def test_apply_columns_equals_the_dense_map_at_one_hot_vectors(affine, weight):
    ids = torch.tensor([[3, 0, 23], [3, 3, 7]])
    w, b = oracle(affine, weight.dense(torch.float64), None)
    one_hot = torch.nn.functional.one_hot(ids, IN).double()
    torch.testing.assert_close(apply_columns(affine, ids, weight), one_hot @ w.T + b, rtol=0, atol=ATOL)


def test_gradients_of_apply_equal_those_of_the_dense_map(affine, weight, base_bias):
    x = noise(5, IN, seed=8)
    g = noise(5, OUT, seed=9)
    names = [p for p in ("A", "B", "out_gain", "in_gain", "bias") if getattr(affine, p) is not None]
    results = []
    for dense in (False, True):
        leaf_x = x.clone().requires_grad_()
        leaves = {n: getattr(affine, n).clone().requires_grad_() for n in names}
        own = replace(affine, **leaves)
        if dense:
            w, b = oracle(own, weight.dense(torch.float64), base_bias)
            y = leaf_x @ w.T + b
        else:
            y = apply(own, leaf_x, weight, base_bias)
        results.append(torch.autograd.grad(y, [leaf_x, *leaves.values()], g))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=10 * ATOL)  # sums of products of three values


def test_a_row_that_is_looked_up_twice_gets_both_gradients(weight):
    ids = torch.tensor([3, 7, 3])
    results = []
    for dense in (False, True):
        A, B = noise(RANK, IN, seed=1).requires_grad_(), noise(OUT, RANK, seed=2).requires_grad_()
        own = Affine(A=A, B=B, scale=SCALE)
        w, _ = oracle(own, weight.dense(torch.float64), None)
        y = w.T[ids] if dense else apply_columns(own, ids, weight)
        results.append(torch.autograd.grad(y, [A, B], noise(3, OUT, seed=9)))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=ATOL)
    assert bool(results[0][0][:, 3].any())


@pytest.mark.parametrize("with_gain", [False, True], ids=["no gain", "gain"])
def test_dropout_reaches_the_low_rank_branch_only(with_gain):
    weight = make_weight()
    affine = make_affine(("low_rank", "bias", "out_gain") if with_gain else ("low_rank", "bias"))
    x, dropped = noise(5, IN, seed=8), noise(5, IN, seed=10)
    wanted = weight.mul(x) + SCALE * dropped @ affine.A.T @ affine.B.T
    wanted = (wanted * affine.out_gain if with_gain else wanted) + affine.bias
    torch.testing.assert_close(apply(affine, x, weight, None, dropped), wanted, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gain_of_one_leaves_the_map_and_its_bias_bit_for_bit(weight, dtype):
    held = DenseWeight(weight.stored.to(dtype), weight.transposed)
    x, bias = noise(5, IN, seed=8).to(dtype), 10 * noise(OUT, seed=7).to(dtype)
    affine = replace(make_affine(("low_rank", "out_gain")), B=torch.zeros(OUT, RANK), out_gain=torch.ones(OUT))
    assert torch.equal(apply(affine, x, held, bias), held.mul(x, bias))


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_a_gained_low_rank_map_passes_gradcheck(weight, with_bias):
    parts = ("low_rank", "out_gain", "bias") if with_bias else ("low_rank", "out_gain")
    affine = make_affine(parts)
    names = [n for n in ("A", "B", "out_gain", "bias") if getattr(affine, n) is not None]
    leaves = [noise(3, IN, seed=8).requires_grad_(), *(getattr(affine, n).requires_grad_() for n in names)]

    def op(x: Tensor, *values: Tensor) -> Tensor:
        return apply(replace(affine, **dict(zip(names, values, strict=True))), x, weight)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("part", ["A", "B", "out_gain", "in_gain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merging_nan_or_inf_is_refused(part, value):
    affine = make_affine(PARTS)
    broken = getattr(affine, part).clone()
    broken.view(-1)[0] = value
    with pytest.raises(WorkFailed, match="merged weight holds NaN or Inf"):
        merged(replace(affine, **{part: broken}), make_weight().dense(torch.float64))


def test_merging_a_bias_with_nan_is_refused():
    bias = torch.full((OUT,), float("nan"))
    with pytest.raises(WorkFailed, match="merged bias holds NaN or Inf"):
        merged(Affine(bias=bias), make_weight().dense(torch.float64))


def test_merging_into_bfloat16_accumulates_in_float32():
    dense = make_weight().stored.bfloat16()
    affine = make_affine(("low_rank",))
    wanted, _ = oracle(affine, dense.double(), None)
    got, _ = merged(affine, dense)
    assert got.dtype == torch.float32
    # values up to 40 from four products, each rounded to float32
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=4 * 40 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("part", "shape"), [("A", (3, 25)), ("B", (41, 3)), ("B", (40, 4)), ("out_gain", (24,)), ("bias", (24,))]
)
def test_a_part_of_another_shape_is_named(part, shape):
    affine = replace(make_affine(PARTS), **{part: torch.zeros(shape)})
    with pytest.raises(ShapeError, match=rf"layer\.x: {part} has shape \({shape[0]},"):
        check(affine, make_weight(), "layer.x")


def test_one_factor_alone_is_refused():
    with pytest.raises(ShapeError, match="A and B come together"):
        check(Affine(A=torch.zeros(3, IN)), make_weight(), "layer.x")


def test_detached_cuts_every_tensor_and_shares_its_memory():
    affine = make_affine(PARTS)
    leaves = {n: getattr(affine, n).requires_grad_() for n in ("A", "B", "out_gain", "in_gain", "bias")}
    cut = detached(replace(affine, **leaves))
    for name, leaf in leaves.items():
        assert not getattr(cut, name).requires_grad
        assert getattr(cut, name).data_ptr() == leaf.data_ptr()


def test_a_dense_weight_shares_the_memory_of_the_tensor_it_was_given(weight):
    stored = torch.nn.Parameter(noise(OUT, IN, seed=6))
    held = DenseWeight(stored, weight.transposed)
    assert held.stored.data_ptr() == stored.data_ptr()
    assert not list(held.parameters())
    assert held.state_dict() == {}


def test_like_keeps_orientation_and_dtype(weight):
    new = weight.like(noise(OUT, IN, seed=11).float())
    assert new.stored.shape == weight.stored.shape
    assert new.dtype == torch.float64
    assert torch.equal(new.dense(torch.float32), noise(OUT, IN, seed=11).float())
    assert new.nbytes() == OUT * IN * 8


def test_the_gradient_product_is_the_transposed_one(weight):
    g = noise(4, OUT, seed=12)
    torch.testing.assert_close(weight.mul_t(g), g @ weight.dense(torch.float64), rtol=0, atol=ATOL)
