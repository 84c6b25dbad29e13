"""Gated activations are their formulas in float64, rounded once; their gradients are autograd's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from made_rows import DTYPES, assert_rounded_once, rows

from deltaw.errors import BadInput, ShapeError
from deltaw.ops import native
from deltaw.ops.gated import gated, gated_backward_, gated_backward_reference, gated_reference

ACTS = ("silu", "gelu_tanh", "gelu")
SHAPES = ((0, 8), (1, 1), (1, 1536), (5, 17), (67, 33))
WITH_GRADIENT = 3e-6  # act' is a sum of two parts that nearly cancel where it is zero


def halves(n: int, f: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up as the halves of one buffer."""
    both = rows((n, 2 * f), 1, dtype)
    return both[:, :f], both[:, f:]


@pytest.mark.parametrize("act", ACTS)
def test_the_gradient_of_the_reference_is_autograds(act):
    gate, up, dh = (rows((9, 11), seed, torch.float64).contiguous() for seed in (1, 2, 3))
    gate, up = gate.requires_grad_(), up.requires_grad_()
    h = gated_reference(gate, up, act)
    wanted = torch.autograd.grad((h * dh).sum(), (gate, up))
    again, dgate, dup = gated_backward_reference(dh, gate.detach(), up.detach(), act)
    assert again.equal(h)
    torch.testing.assert_close((dgate, dup), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("act", ACTS)
def test_values_and_gradients_are_the_formula_rounded_once(any_path, act):
    for (n, f), dtype in itertools.product(SHAPES, DTYPES):
        gate, up = halves(n, f, dtype)
        dh = rows((n, f), 3, dtype)
        wanted = gated_backward_reference(dh.double(), gate.double(), up.double(), act)
        h = gated(gate, up, act)
        assert h.dtype == dtype
        assert h.is_contiguous()
        assert_rounded_once(h, wanted[0])
        assert gated_backward_(dh, gate, up, act).equal(h)
        assert_rounded_once(gate, wanted[1], WITH_GRADIENT)
        assert_rounded_once(up, wanted[2])


@pytest.mark.parametrize("act", ACTS)
def test_h_may_lie_where_dh_does_and_nothing_beside_is_touched(any_path, act):
    (gate, up), dh = halves(7, 21, torch.bfloat16), rows((7, 21), 3, torch.bfloat16)
    edges = gate._base[:, [0, 1, 2, -3, -2, -1]].clone()
    h = gated(gate, up, act)
    first = gate.clone(), up.clone()
    gated_backward_(dh, *first, act)
    found = gated_backward_(dh, gate, up, act, h=dh)
    assert found is dh
    assert dh.equal(h)
    assert gate.equal(first[0])
    assert up.equal(first[1])
    assert gate._base[:, [0, 1, 2, -3, -2, -1]].equal(edges)
    into = torch.zeros(7, 21, dtype=torch.bfloat16)
    assert gated(*halves(7, 21, torch.bfloat16), act, out=into) is into
    assert into.equal(h)


@pytest.mark.parametrize("act", ACTS)
def test_activations_hold_over_the_whole_range(any_path, act):
    """In the left tail too, where 1 + tanh and 1 + erf would cancel: a few units in the last place of float32."""
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64).float().unsqueeze(0)
    one = torch.ones_like(x)
    h = gated(x, one, act).double()
    gated_backward_(one, slope := x.clone(), one.clone(), act)
    wide = x.double()
    if act == "silu":
        s = torch.sigmoid(wide)
        inner = torch.ones_like(wide)
    elif act == "gelu_tanh":
        s = torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
        inner = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * wide**2)
    else:
        s = 0.5 * torch.erfc(-wide / math.sqrt(2))
    by_hand = s + wide * torch.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    if act != "gelu":
        by_hand = s + wide * s * (1 - s) * inner
    torch.testing.assert_close(slope.double(), by_hand, rtol=1e-6, atol=1e-6)
    if any_path == "reference":  # torch's own forms cancel
        torch.testing.assert_close(h, wide * s, rtol=1e-6, atol=1e-6)
        return
    # u = c x (1 + c3 x^2) is rounded to 2^-23 of itself, and reaches 200: that much of s
    seen = (wide * s).abs() > 1e-30
    room = {"silu": 5e-7, "gelu_tanh": 2e-5, "gelu": 1e-6}[act]
    torch.testing.assert_close(h[seen], (wide * s)[seen], rtol=room, atol=0)


@pytest.mark.parametrize("act", ACTS)
def test_huge_gates_give_zero_or_themselves_and_nan_stays(any_path, act):
    x = torch.tensor([[-1e30, -1e4, -200.0, 0.0, 200.0, 1e4, 1e30, float("nan"), float("inf")]])
    one = torch.ones_like(x)
    h = gated(x, one, act)[0]
    assert h[:8].nan_to_num(7).tolist() == [0, 0, 0, 0, x[0, 4].item(), x[0, 5].item(), x[0, 6].item(), 7]
    assert h[8].item() == math.inf or any_path == "reference"  # torch's gelu of it is NaN
    slope = x.clone()
    gated_backward_(one, slope, one.clone(), act)
    if any_path != "reference" or act == "silu":  # torch's tanh form overflows beyond 1e12
        assert slope[0, :7].tolist() == [0, 0, 0, 0.5, 1, 1, 1]
    assert math.isnan(slope[0, 7])


def test_what_cannot_be_read_is_refused(any_path):
    good = torch.ones(4, 6)
    with pytest.raises(BadInput, match="'relu'"):
        gated(good, good, "relu")
    with pytest.raises(BadInput, match="'relu'"):
        gated_backward_(good, good, good, "relu")
    if any_path == "reference":
        assert native.path() == "reference"
        return
    for gate, up in ((good, good[:3]), (good, torch.ones(6, 4).T), (torch.ones(2, 2, 6), torch.ones(2, 2, 6))):
        with pytest.raises(ShapeError):
            gated(gate, up, "silu")
    with pytest.raises(ShapeError, match="up"):
        gated_backward_(good, good.clone(), torch.ones(1, 6).expand(4, 6), "silu")


def test_other_dtypes_take_the_reference_and_on_the_meta_device_only_memory_is_made(any_path):
    for dtype in (torch.float16, torch.float64):
        (gate, up), dh = halves(3, 5, dtype), rows((3, 5), 3, dtype)
        wanted = gated_backward_reference(dh, gate, up, "gelu")
        assert gated(gate, up, "gelu").equal(wanted[0])
        found = gated_backward_(dh, gate, up, "gelu", h=(into := torch.empty_like(dh))), gate, up
        assert found[0] is into
        assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    made = torch.empty(3, 5, device="meta")
    assert gated(made, made, "silu").shape == gated_backward_(made, made, made, "silu").shape == (3, 5)
