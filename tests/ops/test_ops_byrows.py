"""A few rows at a time give what all rows at once give, to the bit."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltaw.ops import byrows
from deltaw.ops.byrows import by_rows

ROWS, WIDTH = 37, 24


def made(dtype: torch.dtype) -> tuple[LlamaRMSNorm, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(5)
    norm = LlamaRMSNorm(WIDTH, eps=1e-5).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(WIDTH, generator=rng))
    x = torch.randn(ROWS, WIDTH, generator=rng).to(dtype).requires_grad_()
    return norm, x, torch.randn(ROWS, WIDTH, generator=rng).to(dtype)


@pytest.mark.parametrize("rows_at_a_time", [1, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_ops_byrows_is_a_norm_and_its_gradient_bit_for_bit(
    rows_at_a_time: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byrows, "_VALUES", rows_at_a_time * WIDTH)
    norm, x, g = made(dtype)
    found, wanted = by_rows(norm, x), norm(x)
    assert torch.equal(found, wanted)
    assert torch.equal(*(torch.autograd.grad(y, x, g)[0] for y in (found, wanted)))


def test_ops_byrows_needs_no_gradient_and_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x, _ = made(torch.float32)
    calls: list[int] = []
    monkeypatch.setattr(byrows, "_VALUES", 10 * WIDTH)
    with torch.no_grad():
        y = by_rows(lambda part: (calls.append(len(part)), norm(part))[1], x)
    assert calls == [10, 10, 10, 7]
    assert torch.equal(y, norm(x.detach()))
    assert by_rows(norm, x[:0]).shape == (0, WIDTH)
