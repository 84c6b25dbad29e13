"""`bottleneck_delta` is its formula, gradients included, and keeps nothing wide in float32."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deltaw.core.bottleneck import ACTIVATIONS, Bottleneck, check_bottleneck
from deltaw.core.site import BlockSite
from deltaw.errors import ShapeError, WorkFailed
from deltaw.ops.bottleneck import ACTS, bottleneck_delta

D, M, SCALE = 24, 5, 0.7

WRITTEN = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
    "silu": lambda x: x / (1 + (-x).exp()),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
}


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def form(act: str = "relu", parallel: bool = False) -> Bottleneck:
    parts = {"down": noise(M, D, seed=1), "up": noise(D, M, seed=2)}
    parts |= {"down_bias": noise(M, seed=3), "up_bias": noise(D, seed=4)}
    return Bottleneck(**parts, act=act, scale=SCALE, parallel=parallel)


def test_every_activation_that_settings_know_is_there():
    assert set(ACTS) == set(ACTIVATIONS) == set(WRITTEN)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_it_is_the_formula(act, parallel):
    f, h, u = form(act, parallel), noise(2, 3, D, seed=5), noise(2, 3, D, seed=6)
    wanted = torch.empty_like(h)
    for i in range(2):
        for j in range(3):
            x = u[i, j] if parallel else h[i, j]
            inner = WRITTEN[act](torch.stack([(f.down[k] * x).sum() for k in range(M)]) + f.down_bias)
            wanted[i, j] = SCALE * (torch.stack([(f.up[k] * inner).sum() for k in range(D)]) + f.up_bias)
    torch.testing.assert_close(bottleneck_delta(f, h, u), wanted, rtol=0, atol=1e-12)  # 24 terms of order 1 to 10


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_it_passes_gradcheck(act, parallel):
    f = form(act, parallel)
    leaves = [t.requires_grad_() for t in (f.down, f.up, f.down_bias, f.up_bias)]
    x = noise(4, D, seed=7).requires_grad_()

    def value(down: Tensor, up: Tensor, down_bias: Tensor, up_bias: Tensor, x: Tensor) -> Tensor:
        made = replace(f, down=down, up=up, down_bias=down_bias, up_bias=up_bias)
        return bottleneck_delta(made, x.detach() if parallel else x, x if parallel else None)

    assert torch.autograd.gradcheck(value, (*leaves, x))


def test_nothing_as_wide_as_the_block_is_kept_in_float32():
    f = form()
    f = replace(f, **{p: getattr(f, p).float().requires_grad_() for p in ("down", "up", "down_bias", "up_bias")})
    h = noise(300, D, seed=8).bfloat16().requires_grad_()
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = bottleneck_delta(f, h)
    wide = {t.data_ptr() for t in kept if t.shape[-1] == D and t.shape[0] == 300}
    assert y.dtype == torch.bfloat16
    assert wide == {h.data_ptr()}  # the input itself, and no copy of it
    assert not [t for t in kept if t.dtype == torch.float32 and t.numel() >= 300 * M]
    y.sum().backward()
    assert f.down.grad.dtype == torch.float32


def test_a_parallel_one_without_its_input_is_an_error():
    with pytest.raises(WorkFailed, match="has not seen the input of its block's half"):
        bottleneck_delta(form(parallel=True), noise(3, D, seed=5))


@pytest.mark.parametrize("part", ["down", "up", "down_bias", "up_bias"])
def test_a_part_that_does_not_fit_its_place_is_named(part):
    site = BlockSite("h.0.mlp.c_proj", "h.0.mlp.c_fc", D, "ffn")
    check_bottleneck(form(), site)
    wrong = replace(form(), **{part: torch.zeros((2, 2) if part in ("down", "up") else (9,))})
    with pytest.raises(ShapeError, match=r"h\.0\.mlp\.c_proj: (down|up)"):
        check_bottleneck(wrong, site)
