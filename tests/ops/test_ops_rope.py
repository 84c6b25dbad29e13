"""Rotary positions in place are transformers' apply_rotary_pos_emb; back is the transposed map."""

from __future__ import annotations

import itertools

import pytest
import torch
from made_rows import DTYPES, assert_rounded_once, rows

from deltaw.errors import ShapeError
from deltaw.ops.rope import rotate_, rotate_reference_

CASES = ((0, 2, 4, 4), (1, 1, 64, 64), (7, 3, 64, 64), (65, 9, 20, 10), (5, 2, 66, 34), (4, 2, 8, 0))  # T, H, D, R


def angles(n: int, r: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [n, r] float32; `whole`: halves that are not equal, to tell one from the other."""
    at = torch.randn(n, r if whole else r // 2, generator=torch.Generator().manual_seed(r))
    at = at if whole else torch.cat([at, at], -1)
    return at.cos(), at.sin()


def test_the_reference_is_that_of_transformers():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = rows((7, 3, 16), 1, torch.float64)
    cos, sin = angles(7, 16, whole=True)
    turned = x.transpose(0, 1)[None]
    wanted, _ = apply_rotary_pos_emb(turned, turned, cos.double()[None], sin.double()[None])
    rotate_reference_(x, cos, sin)
    torch.testing.assert_close(x, wanted[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_back_is_the_gradient():
    start = rows((7, 3, 16), 1, torch.float64)
    cos, sin = angles(7, 10, whole=True)
    x = start.clone().requires_grad_()
    y, g = x.clone(), rows((7, 3, 16), 2, torch.float64)
    rotate_reference_(y, cos, sin)
    (wanted,) = torch.autograd.grad((y * g).sum(), x)
    rotate_reference_(g, cos, sin, back=True)
    torch.testing.assert_close(g, wanted, rtol=1e-12, atol=1e-12)


def test_each_path_turns_a_slice_in_place_and_rounds_once(any_path):
    for (n, heads, d, r), dtype, back in itertools.product(CASES, DTYPES, (False, True)):
        x = rows((n, heads, d), 1, dtype)
        cos, sin = angles(n, r, whole=True)
        before, wanted = x._base.clone(), x.double()
        rotate_reference_(wanted, cos, sin, back=back)
        rotate_(x, cos, sin, back=back)
        assert_rounded_once(x, wanted)
        x[..., :r] = rows((n, heads, d), 1, dtype)[..., :r]
        assert x._base.equal(before), "what is not turned stays"


def test_turning_back_gives_what_was_there(any_path):
    x, (cos, sin) = rows((33, 3, 64), 4, torch.float32), angles(33, 64, whole=False)
    before = x.clone()
    rotate_(x, cos, sin)
    assert not x.allclose(before)
    rotate_(x, cos, sin, back=True)
    torch.testing.assert_close(x, before, rtol=1e-6, atol=1e-6)


def test_other_shapes_are_refused(any_path):
    cos, sin = angles(4, 6, whole=False)
    for x, its_cos, its_sin in (
        (torch.ones(5, 2, 8), cos, sin),
        (torch.ones(4, 2, 4), cos, sin),
        (torch.ones(4, 8), cos, sin),
        (torch.ones(4, 2, 8), cos[:, :5], sin[:, :5]),
        (torch.ones(4, 2, 8), cos, sin[:, :4]),
    ):
        with pytest.raises(ShapeError):
            rotate_(x, its_cos, its_sin)


def test_other_dtypes_take_the_reference_and_on_the_meta_device_nothing_runs(any_path):
    cos, sin = angles(5, 6, whole=True)
    for dtype in (torch.float16, torch.float64):
        x, wanted = (rows((5, 2, 8), 1, dtype) for _ in range(2))
        rotate_reference_(wanted, cos, sin)
        rotate_(x, cos, sin)
        assert x.equal(wanted)
    rotate_(x.to("meta"), cos.to("meta"), sin.to("meta"))
