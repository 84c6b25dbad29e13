"""Optimizer states in 8 bits: bitsandbytes' maps, the nearest level, and training that stays close to 32 bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe, run
from torch import Tensor

from deltaw.train.loop import Loop
from deltaw.train.optim.adamw import CHUNK
from deltaw.train.optim.dynamic import BLOCK, DynamicMap, Scratch, dynamic_table
from deltaw.train.optimizer import make_optimizer, optimizer_state
from deltaw.train.recipe import TrainSpec


@pytest.fixture(scope="module")
def bnb() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def values(n: int, signed: bool) -> Tensor:
    """Values over many decades, with a block of zeros, one of a single value, one that is tiny, and every level."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * 10.0 ** (-7 * torch.rand(n, generator=generator))
    x[:BLOCK] = 0.0
    if n > 4 * BLOCK:
        x[BLOCK : 2 * BLOCK] = 0.0
        x[BLOCK + 17] = -3e-5
        x[2 * BLOCK : 3 * BLOCK] *= 1e-30
        x[3 * BLOCK : 4 * BLOCK] = dynamic_table(signed)
    return x if signed else x.abs()


def quantised(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    codes, absmax = torch.full((x.numel(),), 99, dtype=torch.uint8), torch.full((-(-x.numel() // BLOCK),), 9.0)
    DynamicMap(signed).quantise(x, codes, absmax, Scratch(x.numel() + 5))
    return codes, absmax


def slow_quantise(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Block by block, by the distance to each level in float64; the scaling is in float32."""
    table = dynamic_table(signed).double()
    codes, absmax = [], []
    for block in x.split(BLOCK):
        absmax.append(block.abs().max())
        scaled = block * (1 / absmax[-1].clamp(min=1e-38))
        codes.append((scaled.double()[:, None] - table).abs().argmin(1).to(torch.uint8))
    return torch.cat(codes), torch.stack(absmax)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5 * 256 + 3, 70000])
def test_every_code_is_that_of_the_nearest_level(n: int, signed: bool) -> None:
    x = values(n, signed)
    codes, absmax = quantised(x, signed)
    wanted_codes, wanted_absmax = slow_quantise(x, signed)
    assert torch.equal(absmax, wanted_absmax)
    assert torch.equal(codes, wanted_codes)
    back = torch.empty(n)
    DynamicMap(signed).dequantise(codes, absmax, back, Scratch(n))
    assert torch.equal(back, dynamic_table(signed)[codes.long()] * absmax.repeat_interleave(BLOCK)[:n])


@pytest.mark.parity
@pytest.mark.parametrize("signed", [True, False])
def test_tables_codes_and_values_equal_bitsandbytes(bnb: Any, signed: bool) -> None:
    table = bnb.functional.create_dynamic_map(signed)
    assert torch.equal(dynamic_table(signed), table)
    x = values(70000, signed)
    codes, absmax = quantised(x, signed)
    # its float32 path on a CPU is the one with cells; for float64 it takes the nearest level, as on CUDA
    theirs, their_absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), table, BLOCK)
    assert torch.equal(absmax, their_absmax)
    filled = absmax.repeat_interleave(BLOCK)[: x.numel()] > 0  # it divides zeros by zero
    assert torch.equal(codes[filled], theirs[filled])
    back = torch.empty_like(x)
    DynamicMap(signed).dequantise(codes, absmax, back, Scratch(x.numel()))
    assert torch.equal(back, torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, table, BLOCK, torch.float32))


@pytest.mark.parity
def test_zeros_stay_zero_where_bitsandbytes_lets_them_drift_on_a_cpu(bnb: Any) -> None:
    x = torch.zeros(BLOCK)
    x[3] = 1.0
    for signed in (True, False):
        codes, _ = quantised(x, signed)
        assert torch.equal(dynamic_table(signed)[codes.long()], x)
        theirs, state = bnb.functional.quantize_blockwise(
            x, code=bnb.functional.create_dynamic_map(signed), blocksize=256
        )
        assert (bnb.functional.dequantize_blockwise(theirs, state)[4:] > 1e-5).all()


def test_a_step_is_adamw_on_the_dequantised_states(tmp_path: Path) -> None:
    """Against torch.optim.AdamW on whole tensors, whose states are rounded to 8 bits after each step."""
    sizes = {"large": (CHUNK * 2 + 777,), "matrix": (64, 64), "small": (4095,)}
    settings = {"weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}
    mine = {n: torch.randn(s, generator=torch.Generator().manual_seed(1)) for n, s in sizes.items()}
    reference = {n: t.clone() for n, t in mine.items()}
    optimizer = make_optimizer(mine, TrainSpec(optimizer={**settings, "bits": 8}), tmp_path)
    theirs = torch.optim.AdamW(reference.values(), fused=True, **settings)
    rounded: dict[str, tuple[Tensor, Tensor]] = {}
    for step in range(4):
        for name in sizes:
            grad = torch.randn(sizes[name], generator=torch.Generator().manual_seed(10 + step))
            mine[name].grad, reference[name].grad = grad.clone(), grad.clone()
        for o in (optimizer, theirs):
            o.param_groups[0]["lr"] = 0.01 * (step + 1)
            o.step()
        for name in ("large", "matrix"):
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                state = theirs.state[reference[name]][key]
                codes, absmax = (
                    slow_quantise(state.view(-1), signed) if step == 3 else quantised(state.view(-1), signed)
                )
                rounded[f"{name}|{key}"] = codes, absmax
                state.view(-1).copy_(
                    dynamic_table(signed)[codes.long()] * absmax.repeat_interleave(BLOCK)[: codes.numel()]
                )
    state = optimizer_state(optimizer, mine)
    for name in sizes:
        assert torch.equal(mine[name], reference[name]), name
    for key, (codes, absmax) in rounded.items():
        assert torch.equal(state[f"{key}_codes"].view(-1), codes)
        assert torch.equal(state[f"{key}_absmax"], absmax)
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[f"small|{key}"], theirs.state[reference["small"]][key])


@pytest.mark.parity
def test_steps_stay_near_those_of_bitsandbytes_adamw8bit(bnb: Any, tmp_path: Path) -> None:
    settings = {"weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}
    mine = {"w": torch.randn(100, 128, generator=torch.Generator().manual_seed(0))}
    theirs, exact = (torch.nn.Parameter(mine["w"].clone()) for _ in range(2))
    start = mine["w"].clone()
    optimizers = [
        make_optimizer(mine, TrainSpec(lr=0.01, optimizer={**settings, "bits": 8}), tmp_path),
        bnb.optim.AdamW8bit([theirs], lr=0.01, **settings),
        torch.optim.AdamW([exact], lr=0.01, fused=True, **settings),
    ]
    for step in range(20):
        grad = torch.randn(100, 128, generator=torch.Generator().manual_seed(10 + step)) + 0.5
        mine["w"].grad, theirs.grad, exact.grad = grad.clone(), grad.clone(), grad.clone()
        for o in optimizers:
            o.step()
    theirs, exact = theirs.detach(), exact.detach()
    moved = float((exact - start).norm())
    of_ours, of_theirs = float((mine["w"] - exact).norm()), float((theirs - exact).norm())
    assert 0 < of_ours < 0.02 * moved, "8 bits are a small part of what 20 steps did"
    assert of_ours < 1.1 * of_theirs, "and no farther from 32 bits than bitsandbytes"


def test_states_take_two_bytes_a_parameter(tmp_path: Path) -> None:
    mine = {"w": torch.zeros(1000, 1024)}
    assert make_optimizer(mine, TrainSpec(optimizer={"bits": 8}), tmp_path).resident_bytes == 1024000 * (2 + 8 / 256)
    assert make_optimizer(mine, TrainSpec(), tmp_path).resident_bytes == 1024000 * 8


def test_training_with_states_in_8_bits_stays_close(base: Path, tmp_path: Path) -> None:
    losses = {}
    for bits in (32, 8):
        settings = {"steps": 30, "lr": 0.003, "optimizer": {"bits": bits}}
        events = run(recipe(base, adapter={"method": "full"}, train=settings), tmp_path / str(bits))
        losses[bits] = [e.loss for e in events if e.kind == "step"]
    assert losses[8] != losses[32]
    last = {bits: sum(found[-10:]) / 10 for bits, found in losses.items()}
    assert last[32] < 0.2 * losses[32][0]
    assert last[8] == pytest.approx(last[32], rel=0.05)  # seen: 0.02


def test_a_run_in_8_bits_quantises_its_large_parameters(base: Path) -> None:
    from test_train_step import loop_of

    loop: Loop = loop_of(base, adapter={"method": "full"}, train={"optimizer": {"bits": 8}})
    next(iter(loop.run()))
    state = loop.state()
    large = [n for n, t in loop.parameters.items() if t.numel() >= 4096]
    assert 0 < len(large) < len(loop.parameters)
    for name, tensor in loop.parameters.items():
        codes = state.get(f"o|{name}|exp_avg_codes")
        assert (codes is None) == (name not in large)
        assert codes is None or (codes.dtype, codes.shape) == (torch.uint8, tensor.shape)
