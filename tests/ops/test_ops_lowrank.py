"""`lowrank_linear` is its reference: values and gradients, with and without dropout's second input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.formats.dense import DenseWeight
from deltaw.ops.lowrank import lowrank_linear, lowrank_linear_reference

IN, OUT, RANK, SCALE = 24, 40, 3, 5 / 3


def parts(dtype: torch.dtype = torch.float64, transposed: bool = False) -> tuple[DenseWeight, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    w = torch.randn(OUT, IN, generator=rng, dtype=torch.float64) / IN**0.5
    A = torch.randn(RANK, IN, generator=rng, dtype=torch.float64) / IN**0.5
    B = torch.randn(OUT, RANK, generator=rng, dtype=torch.float64)
    stored = (w.T if transposed else w).contiguous().to(dtype)
    return DenseWeight(stored, transposed), A, B


def inputs(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("separate", [False, True], ids=["z is x", "own z"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=["one row", "rows", "batch", "no rows"])
def test_lowrank_linear_and_its_gradients_equal_the_reference(lead, separate, transposed):
    weight, A, B = parts(transposed=transposed)
    x = inputs(*lead, IN)
    z = inputs(*lead, IN, seed=6) if separate else None
    g = inputs(*lead, OUT, seed=8)
    results = []
    for op in (lowrank_linear, lowrank_linear_reference):
        leaves = [t.clone().requires_grad_() for t in ([x, A, B] if z is None else [x, A, B, z])]
        y = op(leaves[0], weight, leaves[1], leaves[2], SCALE, None if z is None else leaves[3])
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    for got, wanted in zip(*results, strict=True):
        # dot products of at most 40 terms of order 1, associated in another order
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("separate", [False, True], ids=["z is x", "own z"])
def test_lowrank_linear_passes_gradcheck(separate, transposed):
    weight, A, B = parts(transposed=transposed)
    leaves = [inputs(4, IN).requires_grad_(), A.requires_grad_(), B.requires_grad_()]
    if separate:
        leaves.append(inputs(4, IN, seed=6).requires_grad_())

    def op(x, a, b, z=None):
        return lowrank_linear(x, weight, a, b, SCALE, z)

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("frozen", [0, 1, 2, 3])
def test_a_leaf_that_needs_no_gradient_gets_none_and_the_others_keep_theirs(frozen):
    weight, A, B = parts()
    leaves = [inputs(4, IN), A, B, inputs(4, IN, seed=6)]
    wanted = [t.clone().requires_grad_() for t in leaves]
    lowrank_linear_reference(*wanted[:1], weight, *wanted[1:3], SCALE, wanted[3]).square().sum().backward()
    got = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(leaves)]
    lowrank_linear(*got[:1], weight, *got[1:3], SCALE, got[3]).square().sum().backward()
    assert got[frozen].grad is None
    for i in set(range(4)) - {frozen}:
        torch.testing.assert_close(got[i].grad, wanted[i].grad, rtol=0, atol=1e-12)  # squares: order 100


def test_an_input_that_is_not_contiguous_gives_the_same_result():
    weight, A, B = parts()
    x = inputs(IN, 3, 2).permute(2, 1, 0)
    assert not x.is_contiguous()
    got, wanted = (op(x, weight, A, B, SCALE) for op in (lowrank_linear, lowrank_linear_reference))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_bfloat16_arithmetic_with_float32_parameters_stays_within_its_rounding(transposed):
    weight, A, B = parts(torch.bfloat16, transposed)
    a, b = A.float().requires_grad_(), B.float().requires_grad_()
    x = inputs(6, IN).bfloat16().requires_grad_()
    g = inputs(6, OUT, seed=8).bfloat16()
    y = lowrank_linear(x, weight, a, b, SCALE)
    y.backward(g)
    assert y.dtype == x.grad.dtype == torch.bfloat16
    assert a.grad.dtype == b.grad.dtype == torch.float32

    exact = [t.detach().double().requires_grad_() for t in (x, a, b)]
    wide = DenseWeight(weight.stored.double(), transposed)
    wanted = lowrank_linear_reference(exact[0], wide, exact[1], exact[2], SCALE)
    wanted.backward(g.double())
    # each result passes at most 4 roundings to bfloat16 (A or B, u or h, the product W x, the sum), each of
    # half of 2^-7 relative to the largest value on the way
    eps = torch.finfo(torch.bfloat16).eps
    for got, want in [(y, wanted), (x.grad, exact[0].grad), (a.grad, exact[1].grad), (b.grad, exact[2].grad)]:
        most = want.detach().abs().max().item()
        torch.testing.assert_close(got.double(), want, rtol=0, atol=4 * eps / 2 * most)


def test_the_frozen_weight_and_the_inputs_are_not_changed():
    weight, A, B = parts()
    x = inputs(4, IN)
    before = [t.clone() for t in (weight.stored, A, B, x)]
    lowrank_linear(x, weight, A.requires_grad_(), B.requires_grad_(), SCALE).sum().backward()
    assert all(torch.equal(t, old) for t, old in zip((weight.stored, A, B, x), before, strict=True))
    assert weight.stored.grad is None
