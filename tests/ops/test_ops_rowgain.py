"""`gained` is its reference: values and gradients; a gain of one is nothing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.ops.rowgain import gained, gained_reference

OUT = 40


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0,)], ids=["one row", "rows", "batch", "no rows"])
def test_gained_and_its_gradients_equal_the_reference(lead, with_bias):
    parts = [noise(*lead, OUT, seed=1), noise(OUT, seed=2)] + ([noise(OUT, seed=3)] if with_bias else [])
    g = noise(*lead, OUT, seed=4)
    results = []
    for op in (gained, gained_reference):
        leaves = [t.clone().requires_grad_() for t in parts]
        y = op(*leaves)
        results.append([y, *torch.autograd.grad(y, leaves, g)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13)  # three products of order 1


@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
def test_gained_passes_gradcheck(with_bias):
    leaves = [noise(4, 7, seed=1), noise(7, seed=2)] + ([noise(7, seed=3)] if with_bias else [])
    assert torch.autograd.gradcheck(gained, [t.requires_grad_() for t in leaves])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_leaf_that_needs_no_gradient_gets_none_and_the_others_keep_theirs(frozen):
    leaves = [noise(4, OUT, seed=1), noise(OUT, seed=2), noise(OUT, seed=3)]
    wanted = [t.clone().requires_grad_() for t in leaves]
    gained_reference(*wanted).square().sum().backward()
    got = [t.clone().requires_grad_(i != frozen) for i, t in enumerate(leaves)]
    gained(*got).square().sum().backward()
    assert got[frozen].grad is None
    for i in set(range(3)) - {frozen}:
        torch.testing.assert_close(got[i].grad, wanted[i].grad, rtol=0, atol=1e-11)  # squares: order 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_gain_of_one_is_nothing_bit_for_bit(dtype):
    t = noise(6, OUT, seed=1, dtype=dtype)
    assert torch.equal(gained(t, torch.ones(OUT), 100 * noise(OUT, seed=3, dtype=dtype)), t)


def test_bfloat16_keeps_a_gain_that_it_has_no_number_for():
    t, gain = noise(6, OUT, seed=1, dtype=torch.bfloat16), torch.full((OUT,), 1.003)
    assert torch.equal(gain.bfloat16(), torch.ones(OUT).bfloat16())
    y = gained(t, gain)
    exact = t.double() * 1.003
    # one rounding of the result, and one of the distance from one
    half = torch.finfo(torch.bfloat16).eps / 2
    assert bool(((y.double() - exact).abs() <= half * (exact.abs() * 1.004 + 0.003 * t.double().abs())).all())
    assert not torch.equal(y, t)


def test_bfloat16_gradients_stay_within_its_rounding():
    t, g = noise(50, OUT, seed=1, dtype=torch.bfloat16), noise(50, OUT, seed=4, dtype=torch.bfloat16)
    gain, bias = 1 + 0.1 * noise(OUT, seed=2).float(), noise(OUT, seed=3, dtype=torch.bfloat16)
    leaves = [x.clone().requires_grad_() for x in (t, gain, bias)]
    gained(*leaves).backward(g)
    exact = [x.double().requires_grad_() for x in (t, gain, bias)]
    gained_reference(*exact).backward(g.double())
    half = torch.finfo(torch.bfloat16).eps / 2
    for got, want in zip(leaves, exact, strict=True):
        assert got.grad.dtype == got.dtype
        most = float(want.grad.abs().max())
        # of each product, of d, and of the result; a sum's terms are rounded one by one
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=0, atol=3 * half * max(most, 4.0))


def test_a_result_that_is_written_into_does_not_change_the_gradients():
    leaves = [noise(4, OUT, seed=1), noise(OUT, seed=2), noise(OUT, seed=3)]
    wanted = [t.clone().requires_grad_() for t in leaves]
    (gained(*wanted) * 3).sum().backward()
    got = [t.clone().requires_grad_() for t in leaves]
    gained(*got).mul_(3).sum().backward()
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.grad, w.grad)


def test_its_inputs_are_not_changed():
    leaves = [noise(4, OUT, seed=1), noise(OUT, seed=2), noise(OUT, seed=3)]
    before = [t.clone() for t in leaves]
    g = noise(4, OUT, seed=4)
    held = g.clone()
    gained(*[t.requires_grad_() for t in leaves]).backward(g)
    assert all(torch.equal(t, old) for t, old in zip((*leaves, g), (*before, held), strict=True))
