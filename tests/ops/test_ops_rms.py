"""RMSNorm of rows is its formula in float64, rounded once; its gradient is autograd's."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from made_rows import DTYPES, assert_rounded_once, rows

from deltaw.errors import ShapeError
from deltaw.ops import native
from deltaw.ops.rms import rms_norm, rms_norm_backward, rms_norm_backward_reference, rms_norm_reference

SHAPES = ((0, 8), (1, 1), (1, 576), (5, 17), (67, 64), (200, 33), (4, 3, 64), (131, 2, 20), (0, 2, 4))
EPS = 1e-5


def weight_of(d: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(d, generator=torch.Generator().manual_seed(d)).to(dtype)


def test_the_reference_is_torchs_rms_norm_and_its_gradient_is_autograds():
    for one_plus in (False, True):
        x = rows((7, 3, 10), 1, torch.float64).requires_grad_()
        weight = weight_of(10, torch.float64).requires_grad_()
        y, rstd = rms_norm_reference(x, weight, EPS, one_plus=one_plus)
        torch.testing.assert_close(y, F.rms_norm(x, (10,), weight + 1 if one_plus else weight, EPS))
        g, add = rows((7, 3, 10), 2, torch.float64), rows((7, 3, 10), 3, torch.float64)
        wanted = torch.autograd.grad((y * g + x * add).sum(), (x, weight))
        found = rms_norm_backward_reference(g, x.detach(), weight.detach(), rstd.detach(), one_plus=one_plus, add=add)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_row_is_its_formula_rounded_once(any_path):
    for shape, dtype, one_plus in itertools.product(SHAPES, DTYPES, (False, True)):
        x = rows(shape, 1, dtype)
        for weight in (None, weight_of(shape[-1], torch.float32), weight_of(shape[-1], torch.bfloat16)):
            y, rstd = rms_norm(x, weight, EPS, one_plus=one_plus)
            wide = None if weight is None else weight.double()
            wanted, its_rstd = rms_norm_reference(x.double(), wide, EPS, one_plus=one_plus)
            assert y.dtype == dtype
            assert rstd.dtype == torch.float32
            assert y.is_contiguous()
            assert_rounded_once(y, wanted)
            assert_rounded_once(rstd, its_rstd)


def test_gradients_are_the_formula_rounded_once(any_path):
    shapes = [shape for shape in SHAPES if shape[-1] > 1]  # dx of one value is zero but for eps
    for shape, dtype, one_plus in itertools.product(shapes, DTYPES, (False, True)):
        x, g, add = (rows(shape, seed, dtype) for seed in (1, 2, 3))
        for weight, plus in itertools.product((None, weight_of(shape[-1], torch.float32)), (None, add)):
            _, rstd = rms_norm(x, weight, EPS, one_plus=one_plus)
            dx, dweight = rms_norm_backward(g, x, weight, rstd, one_plus=one_plus, add=plus, need_weight=True)
            wide = [None if t is None else t.double() for t in (g, x, weight)]
            _, its_rstd = rms_norm_reference(wide[1], wide[2], EPS, one_plus=one_plus)
            wanted, its_dweight = rms_norm_backward_reference(
                *wide, its_rstd, one_plus=one_plus, add=None if plus is None else plus.double()
            )
            assert dx.dtype == dtype
            assert dweight.dtype == torch.float32
            assert_rounded_once(dx, wanted)
            assert_rounded_once(dweight, its_dweight, 2e-6)  # a sum of 200 rows, that may cancel
            without = rms_norm_backward(g, x, weight, rstd, one_plus=one_plus, add=plus)
            assert without[1] is None
            assert without[0].equal(dx)


def test_results_may_lie_where_the_inputs_do_and_nothing_beside_them_is_touched(any_path):
    for shape, dtype in itertools.product(((9, 33), (6, 2, 20)), DTYPES):
        weight = weight_of(shape[-1], dtype)
        x, g, add = (rows(shape, seed, dtype) for seed in (1, 2, 3))
        y, rstd = rms_norm(x, weight, EPS)
        dx, _ = rms_norm_backward(g, x, weight, rstd, add=add)
        for at in range(3):
            seen = [rows(shape, seed, dtype) for seed in (1, 2, 3)]
            into = seen[at]
            beside = into._base.clone()
            found, _ = rms_norm_backward(seen[1], seen[0], weight, rstd, add=seen[2], out=into)
            assert found is into
            assert into.equal(dx)
            into.copy_(rows(shape, at + 1, dtype))
            assert into._base.equal(beside)
        into = rows(shape, 1, dtype)
        assert rms_norm(into, weight, EPS, out=into)[0] is into
        assert into.equal(y)


def test_results_are_the_same_for_any_number_of_threads(any_path):
    x, g = rows((3000, 65), 1, torch.bfloat16), rows((3000, 65), 2, torch.bfloat16)
    weight, before = weight_of(65, torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            y, rstd = rms_norm(x, weight, EPS)
            found.append((y, rstd, *rms_norm_backward(g, x, weight, rstd, need_weight=True)))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(found[0][:3], found[1][:3], strict=True))
    assert all(a.equal(b) for a, b in zip(found[1], found[2], strict=True))


def test_nan_stays_in_its_row_and_large_values_are_scaled(any_path):
    x = torch.ones(3, 40)
    x[0, 33], x[1] = float("nan"), 1e18
    y, rstd = rms_norm(x, None, EPS)
    assert bool(y[0].isnan().all())
    torch.testing.assert_close(y[1:], torch.ones(2, 40), rtol=1e-5, atol=0)
    dx, _ = rms_norm_backward(torch.ones(3, 40), x, None, rstd)
    assert bool(dx[0].isnan().all())
    assert bool(dx[1:].isfinite().all())


def test_rows_that_the_kernel_cannot_read_are_refused(any_path):
    if any_path == "reference":
        assert native.path() == "reference"
        return
    good, rstd = torch.ones(4, 6), torch.ones(4)
    for x, weight, out in (
        (torch.ones(6, 4).T, None, None),
        (torch.ones(4), None, None),
        (torch.ones(4, 3, 4)[..., :2], None, None),
        (good, torch.ones(5), None),
        (good, None, torch.ones(4, 5)),
        (good, None, torch.ones(1, 6).expand(4, 6)),
    ):
        with pytest.raises(ShapeError):
            rms_norm(x, weight, EPS, out=out)
    for g, its_rstd, add in ((torch.ones(4, 5), rstd, None), (good, rstd[:3], None), (good, rstd, good[:3])):
        with pytest.raises(ShapeError):
            rms_norm_backward(g, good, None, its_rstd, add=add)


def test_other_dtypes_take_the_reference_and_on_the_meta_device_only_memory_is_made(any_path):
    for dtype in (torch.float16, torch.float64):
        x, g = rows((5, 17), 1, dtype), rows((5, 17), 2, dtype)
        y, rstd = rms_norm(x, None, EPS)
        assert y.equal(rms_norm_reference(x, None, EPS)[0])
        found = rms_norm_backward(g, x, None, rstd, need_weight=True, out=(into := torch.empty_like(x)))
        wanted = rms_norm_backward_reference(g, x, None, rstd)
        assert found[0] is into
        assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    x = torch.empty(5, 17, device="meta")
    y, rstd = rms_norm(x, torch.ones(17, device="meta"), EPS)
    dx, dweight = rms_norm_backward(y, x, None, rstd, need_weight=True)
    assert [t.shape for t in (y, rstd, dx, dweight)] == [(5, 17), (5,), (5, 17), (17,)]
    assert all(t.is_meta for t in (y, rstd, dx, dweight))
