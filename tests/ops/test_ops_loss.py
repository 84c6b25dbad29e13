"""The loss is torch's cross_entropy, row by row and summed: value and gradient, on every path."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from made_rows import DTYPES, assert_rounded_once

from deltaw.errors import ShapeError
from deltaw.ops import loss, native
from deltaw.ops.loss import cross_entropy_, summed_cross_entropy

ROWS, VOCAB = 11, 37


def logits_and_targets(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(ROWS, VOCAB, generator=rng, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, VOCAB, (ROWS,), generator=rng)


@pytest.fixture(params=[1_000_000, 4 * VOCAB, VOCAB, 1], ids=["one chunk", "3 chunks", "row by row", "tiny limit"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_VALUES", request.param)
    with native.forced("reference"):  # which alone has chunks
        yield


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_value_and_gradient_equal_cross_entropy(dtype, atol):
    logits, targets = logits_and_targets(dtype)
    got, wanted = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value = summed_cross_entropy(got, targets)
    reference = F.cross_entropy(wanted, targets, reduction="sum")
    (value * 0.7).backward()
    (reference * 0.7).backward()
    # a sum of 11 losses of order 10: 11 * 10 * eps is 1.3e-5 in float32
    torch.testing.assert_close(value, reference, rtol=0, atol=atol)
    torch.testing.assert_close(got.grad, wanted.grad, rtol=0, atol=4 * torch.finfo(dtype).eps)  # softmax <= 1


@pytest.mark.usefixtures("chunked")
def test_bfloat16_logits_give_a_float32_value_and_a_gradient_within_one_rounding():
    logits, targets = logits_and_targets(torch.bfloat16)
    got, wanted = logits.clone().requires_grad_(), logits.double().requires_grad_()
    value = summed_cross_entropy(got, targets)
    reference = F.cross_entropy(wanted, targets, reduction="sum")
    scale = 1 / 1021  # one over the targets of a step: not a bfloat16 number
    (value * scale).backward()
    (reference * scale).backward()
    assert value.dtype == torch.float32
    assert got.grad.dtype == torch.bfloat16
    assert abs(value.item() - reference.item()) < 2e-5  # as in float32
    # two roundings, of the softmax and of its product with the scale; the scale itself is not rounded
    rtol = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(got.grad.double(), wanted.grad, rtol=rtol, atol=scale * 1e-6)


def test_the_scale_of_the_loss_is_not_rounded_to_bfloat16(any_path):
    logits, targets = logits_and_targets(torch.bfloat16)
    got = logits.clone().requires_grad_()
    scale = (1 + 2**-8) / 2**10  # halfway between two bfloat16 numbers
    (summed_cross_entropy(got, targets) * scale).backward()
    whole = logits.clone().requires_grad_()
    summed_cross_entropy(whole, targets).backward()
    assert torch.equal(got.grad, (whole.grad.float() * scale).bfloat16())


def test_large_logits_do_not_overflow_and_the_input_is_not_changed(any_path):
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0]])
    before, targets = logits.clone(), torch.tensor([1, 2])
    value = summed_cross_entropy(logits.requires_grad_(), targets)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(before, targets, reduction="sum"))
    assert bool(logits.grad.isfinite().all())
    assert torch.equal(logits.detach(), before)


def test_no_targets_give_a_loss_of_zero(any_path):
    logits = torch.empty(0, VOCAB, requires_grad=True)
    value = summed_cross_entropy(logits, torch.empty(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, VOCAB)


# Row by row, in place -------------------------------------------------------------------------------------------------


def test_rows_are_cross_entropy_and_logits_become_its_gradient(any_path):
    for (n, v), dtype, scale in itertools.product(((1, 17), (5, 16), (9, 1), (3, 5003)), DTYPES, (1.0, -0.37)):
        rng = torch.Generator().manual_seed(v)
        logits = (3 * torch.randn(n, v, generator=rng)).to(dtype)
        targets = torch.randint(0, v, (n,), generator=rng)
        wide = logits.double().requires_grad_()
        wanted = F.cross_entropy(wide, targets, reduction="none")
        (wanted.sum() * scale).backward()
        losses = cross_entropy_(logits, targets, scale)
        assert losses.dtype == torch.float32
        assert_rounded_once(losses, wanted.detach())
        assert_rounded_once(logits, wide.grad)


def test_rows_may_lie_apart_and_what_lies_between_stays(any_path):
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.randn(5, 300).to(dtype)
        apart, targets = wide.clone(), torch.tensor([0, 255, 7, 7, 100])
        dense = wide[:, :256].contiguous()
        losses = cross_entropy_(apart[:, :256], targets, 0.7)
        assert torch.equal(losses, cross_entropy_(dense, targets, 0.7))
        assert torch.equal(apart[:, :256], dense)
        assert torch.equal(apart[:, 256:], wide[:, 256:])


def test_losses_go_where_they_are_wanted(any_path):
    logits, targets = logits_and_targets(torch.float32)
    into = torch.empty(ROWS)
    assert cross_entropy_(logits.clone(), targets, losses=into) is into
    assert into.equal(cross_entropy_(logits, targets))


def test_a_row_may_be_huge_or_infinitely_small_but_for_its_target(any_path):
    inf, nan = math.inf, math.nan
    logits = torch.full((5, 17), -inf)
    logits[:, 3] = torch.tensor([2.0, 1e4, 1e38, nan, -inf])
    logits[1, 4], logits[2, 5] = 1e4, -1e38
    for dtype in DTYPES:
        made = logits.to(dtype, copy=True)
        losses = cross_entropy_(made, torch.full((5,), 3))
        torch.testing.assert_close(losses, torch.tensor([0, math.log(2), 0, nan, nan]), equal_nan=True)
        wanted = torch.zeros(5, 17)
        wanted[1, 3], wanted[1, 4], wanted[3:] = -0.5, 0.5, nan
        torch.testing.assert_close(made.float(), wanted, equal_nan=True)


def test_a_nan_anywhere_in_a_row_is_in_its_loss_and_nowhere_else(any_path):
    for at in (0, 15, 16, 36):
        logits, targets = logits_and_targets(torch.float32)
        logits[2, at] = math.nan
        losses = cross_entropy_(logits, targets)
        assert losses.isnan().nonzero().tolist() == [[2]]
        assert bool(logits[2].isnan().all())
        assert int(logits.isnan().sum()) == VOCAB


def test_a_gradient_is_made_only_where_it_is_needed_and_logits_of_any_layout_are_taken(any_path):
    logits, targets = logits_and_targets(torch.float32)
    value = summed_cross_entropy(logits, targets)
    turned = logits.T.contiguous().T.requires_grad_()
    again = summed_cross_entropy(turned, targets)
    again.backward()
    assert value.equal(again)
    assert not value.requires_grad
    cross_entropy_(logits, targets)
    assert turned.grad.equal(logits)


def test_what_the_kernel_cannot_read_is_refused(any_path):
    if any_path == "reference":
        assert native.path() == "reference"
        return
    logits, targets = logits_and_targets(torch.float32)
    for its_logits, its_targets in (
        (logits.T.contiguous().T, targets),
        (logits[0], targets[:1]),
        (logits, targets[:-1]),
        (logits, targets.int()),
        (logits, targets - VOCAB),
        (logits, targets + VOCAB),
    ):
        with pytest.raises(ShapeError):
            cross_entropy_(its_logits, its_targets)
    with pytest.raises(ShapeError, match="losses"):
        cross_entropy_(logits, targets, losses=torch.empty(ROWS + 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ops_loss_may_put_the_gradient_where_the_logits_were(dtype):
    rng = torch.Generator().manual_seed(8)
    given = torch.randn(7, 31, generator=rng).to(dtype)
    targets = torch.randint(31, (7,), generator=rng)
    leaf, other = (given.clone().requires_grad_() for _ in range(2))
    logits = leaf * 2
    loss = summed_cross_entropy(logits, targets, spend=True)
    seen: list[int] = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    (0.3 * loss).backward(retain_graph=True)
    (0.3 * summed_cross_entropy(other * 2, targets)).backward()
    assert torch.equal(leaf.grad, other.grad)
    assert seen == [logits.data_ptr()]
    with pytest.raises(RuntimeError, match="runs once"):
        loss.backward()


def test_ops_loss_that_spends_logits_which_others_keep_is_refused_in_the_backward():
    leaf = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits = leaf.exp()  # keeps its result for the backward
    loss = summed_cross_entropy(logits, torch.tensor([1, 2, 3, 8]), spend=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
