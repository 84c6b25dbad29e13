"""The head's loss in chunks, against the whole matrix of logits."""

from __future__ import annotations

import pytest
import torch

from deltaw.formats.dense import DenseWeight
from deltaw.ops import head
from deltaw.ops.arena import Arena
from deltaw.ops.head import head_loss, head_loss_reference

ROWS, WIDTH, VOCAB = 11, 6, 17


def drawn(dtype: torch.dtype, bias: bool) -> tuple[torch.Tensor, DenseWeight, torch.Tensor | None, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    h = torch.randn(ROWS, WIDTH, generator=rng).to(dtype).requires_grad_()
    weight = DenseWeight(torch.randn(VOCAB, WIDTH, generator=rng).to(dtype))
    b = torch.randn(VOCAB, generator=rng).to(dtype) if bias else None
    return h, weight, b, torch.randint(VOCAB, (ROWS,), generator=rng)


@pytest.mark.parametrize("rows_at_a_time", [1, 4, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ops_head_loss_and_gradient(
    rows_at_a_time: int, bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CHUNK", rows_at_a_time * VOCAB * dtype.itemsize)
    h, weight, b, targets = drawn(dtype, bias)
    found = head_loss(h, weight, b, targets, Arena())
    wanted = head_loss_reference(h, weight, b, targets)
    assert found.dtype == wanted.dtype == torch.promote_types(dtype, torch.float32)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)
    (a,), (c,) = (torch.autograd.grad(0.3 * loss, h) for loss in (found, wanted))
    torch.testing.assert_close(a, c, rtol=tolerance, atol=tolerance)


def test_ops_head_without_rows_and_without_gradient() -> None:
    h, weight, b, targets = drawn(torch.float32, True)
    arena = Arena()
    none = head_loss(h[:0], weight, b, targets[:0], arena)
    assert float(none.detach()) == 0
    with torch.no_grad():
        loss = head_loss(h, weight, b, targets, arena)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, head_loss_reference(h, weight, b, targets).detach())
