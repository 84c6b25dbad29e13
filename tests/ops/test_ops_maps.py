"""Maps that share an input, against autograd over `ops.affine.apply` in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from deltaw.core.affine import Affine
from deltaw.formats.dense import DenseWeight
from deltaw.ops import maps
from deltaw.ops.affine import apply
from deltaw.ops.arena import Arena

OUT = (5, 3)
IN = 7
ROWS = 4


def drawn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_(grad)


def made(out: int, parts: frozenset[str], base_bias: bool) -> maps.Map:
    given = {p: drawn(out if p != "in_gain" else IN, grad=True) for p in parts - {"AB"}}
    if "AB" in parts:
        given |= {"A": drawn(2, IN, grad=True), "B": drawn(out, 2, grad=True), "scale": 1.7}
    affine = Affine(**given) if given else None
    return maps.Map(DenseWeight(drawn(out, IN)), drawn(out) if base_bias else None, affine)


CASES = [frozenset(c) for n in range(5) for c in itertools.combinations(("AB", "out_gain", "in_gain", "bias"), n)]


@pytest.mark.parametrize("parts", CASES, ids=lambda c: "+".join(sorted(c)) or "plain")
@pytest.mark.parametrize("base_bias", [False, True])
def test_ops_maps_equal_autograd_for_every_set_of_parts(parts: frozenset[str], base_bias: bool) -> None:
    torch.manual_seed(0)
    group = [made(OUT[0], parts, base_bias), made(OUT[1], frozenset({"AB"}), base_bias)]
    x, onto = drawn(ROWS, IN, grad=True), drawn(ROWS, OUT[0])
    grads = [drawn(ROWS, n) for n in OUT]
    wanted = [apply(m.affine or Affine(), x, m.weight, m.bias) for m in group]
    own = maps.parameters(group)
    autograd = torch.autograd.grad(wanted, [x, *own], grads)
    arena = Arena()
    outs = list(torch.empty(ROWS, sum(OUT), dtype=torch.float64).split(OUT, 1))
    with torch.no_grad():
        kept = maps.forward(group, x, outs, arena)
        dx = torch.empty_like(x)
        inner = maps.input_gradient(group, kept, grads, dx, arena)
        of_parts = maps.parameter_gradients(group, kept, inner, grads, x, arena)
    for found, value in zip([*outs, dx, *of_parts], [*wanted, *autograd], strict=True):
        torch.testing.assert_close(found, value, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        out = torch.empty(ROWS, OUT[0], dtype=torch.float64)
        maps.forward(group[:1], x, [out], arena, onto=onto)
        added = torch.ones_like(x)
        maps.input_gradient(group, kept, grads, added, arena, add=True)
    torch.testing.assert_close(out, wanted[0] + onto, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(added, dx + 1, rtol=1e-10, atol=1e-10)


def test_ops_maps_gradient_is_none_where_nothing_trains() -> None:
    torch.manual_seed(0)
    affine = Affine(A=drawn(2, IN), B=drawn(OUT[0], 2, grad=True), out_gain=drawn(OUT[0]))
    group = [maps.Map(DenseWeight(drawn(OUT[0], IN)), None, affine)]
    x, g, arena = drawn(ROWS, IN), drawn(ROWS, OUT[0]), Arena()
    with torch.no_grad():
        kept = maps.forward(group, x, [torch.empty_like(g)], arena)
        inner = maps.input_gradient(group, kept, [g], None, arena)
        a, b, gain = maps.parameter_gradients(group, kept, inner, [g], x, arena)
    assert a is None
    assert gain is None
    assert b is not None
    assert b.abs().min() > 0
