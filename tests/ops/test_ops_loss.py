"""`summed_cross_entropy` is torch's cross_entropy(reduction="sum"): value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from deltaw.ops import loss
from deltaw.ops.loss import summed_cross_entropy

ROWS, VOCAB = 11, 37


def logits_and_targets(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(ROWS, VOCAB, generator=rng, dtype=torch.float64)
    return logits.to(dtype), torch.randint(0, VOCAB, (ROWS,), generator=rng)


@pytest.fixture(params=[1_000_000, 4 * VOCAB, VOCAB, 1], ids=["one chunk", "3 chunks", "row by row", "tiny limit"])
def chunked(request, monkeypatch):
    monkeypatch.setattr(loss, "_CHUNK_VALUES", request.param)


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


def test_the_scale_of_the_loss_is_not_rounded_to_bfloat16():
    logits, targets = logits_and_targets(torch.bfloat16)
    got = logits.clone().requires_grad_()
    scale = (1 + 2**-8) / 2**10  # halfway between two bfloat16 numbers
    (summed_cross_entropy(got, targets) * scale).backward()
    whole = logits.clone().requires_grad_()
    summed_cross_entropy(whole, targets).backward()
    assert torch.equal(got.grad, (whole.grad.float() * scale).bfloat16())


def test_large_logits_do_not_overflow_and_the_input_is_not_changed():
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 1.0]])
    before, targets = logits.clone(), torch.tensor([1, 2])
    value = summed_cross_entropy(logits.requires_grad_(), targets)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(before, targets, reduction="sum"))
    assert bool(logits.grad.isfinite().all())
    assert torch.equal(logits.detach(), before)


def test_no_targets_give_a_loss_of_zero():
    logits = torch.empty(0, VOCAB, requires_grad=True)
    value = summed_cross_entropy(logits, torch.empty(0, dtype=torch.long))
    value.backward()
    assert value.item() == 0
    assert logits.grad.shape == (0, VOCAB)
