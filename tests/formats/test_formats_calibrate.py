"""Calibrated codes: GPTQ's own equations solved the slow way, a smaller error of outputs, and bytes anybody reads."""

from __future__ import annotations

import pytest
import torch
from oracle import LEVELS, NAMES
from torch import Tensor

from deltaw.errors import BaseError
from deltaw.formats import QUANTISED
from deltaw.formats.calibrate import DAMPING, FRACTIONS, calibrated, inverse_factor, second_moment

OUT, IN = 24, 40


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int = 300, width: int = IN, seed: int = 1) -> Tensor:
    """Inputs of a map that differ in size and go together: [n, width]."""
    return noise(n, width, seed=seed) @ (noise(width, width, seed=seed + 1) / 6 + torch.eye(width))


def damped(x: Tensor) -> Tensor:
    """H of the paper in float64."""
    h = x.double().T @ x.double() / len(x)
    return h + DAMPING * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def objective(w: Tensor, q: Tensor, h: Tensor) -> float:
    apart = w.double() - q.double()
    return float((apart @ h * apart).sum())


def level(values: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The nearest level of each value, times its scale, the slow way."""
    return levels[(values[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale


def slow_scales(w: Tensor, h: Tensor, levels: Tensor, block: int) -> Tensor:
    """Of each value its block's scale: the fraction whose rounding costs least, 1 / [H_F^-1]_jj a squared error."""
    cost = torch.tensor([1 / float(torch.linalg.inv(h[j:, j:])[0, 0]) for j in range(w.shape[1])]).double()
    costs, found = cost.expand(w.shape).reshape(-1), []
    for values, c in zip(w.reshape(-1).split(block), costs.split(block), strict=True):
        tried = [values.abs().max() * f for f in FRACTIONS]
        loss = [float(((level(values, s.expand_as(values), levels) - values) ** 2 * c).sum()) for s in tried]
        found.append(tried[loss.index(min(loss))].expand_as(values))
    return torch.cat(found).view(w.shape)


def slow(w: Tensor, h: Tensor, levels: Tensor, scales: Tensor) -> Tensor:
    """Equations 2 and 3 of GPTQ as they stand: the inverse of what is left of H is taken anew for each column."""
    w, q = w.double().clone(), torch.empty(w.shape, dtype=torch.float64)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(h[j:, j:])
        q[:, j] = level(w[:, j], scales[:, j], levels)
        w[:, j:] -= ((w[:, j] - q[:, j]) / inverse[0, 0])[:, None] * inverse[0]
    return q


@pytest.mark.parametrize("block", [32, 64])  # the one ends inside a row, the other runs over its end
@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_those_of_a_slow_reference(name, block):
    w, x = noise(OUT, IN), inputs()
    h, levels = damped(x), LEVELS[name]
    scales = slow_scales(w.double(), h, levels, block)
    mine = calibrated(QUANTISED[name], w, inverse_factor(second_moment(x)), torch.float32, block)
    wanted = slow(w, h, levels, scales).float()
    torch.testing.assert_close(mine.absmax, scales.reshape(-1)[::block].float(), rtol=1e-6, atol=0)
    # one place of 960 may fall to the other side of a half-way point in float32, and moves what comes after in its row
    step = float(scales.max()) * float(LEVELS[name].unique().diff().max())
    assert int(((mine.dense() - wanted).abs().amax(1) > 1e-4 * step).sum()) <= 1


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_nearer_than_with_the_nearest_levels(name, double):
    w, x = noise(67, 96, seed=3) * torch.logspace(-1, 0, 67)[:, None], inputs(400, 96)
    h = damped(x)
    mine = calibrated(QUANTISED[name], w, inverse_factor(second_moment(x)), torch.float32, 64, double)
    plain = QUANTISED[name].quantised(w, torch.float32, 64, double)
    assert (mine.double_quant, mine.block) == (double, 64)
    assert objective(w, mine.dense(), h) < 0.7 * objective(w, plain.dense(), h)


def test_inputs_without_relation_leave_each_value_its_nearest_level():
    w = noise(OUT, IN)
    mine = calibrated(QUANTISED["nf4"], w, torch.eye(IN) * 0.5, torch.float32)
    scale = mine.absmax.repeat_interleave(64)[: w.numel()].view(OUT, IN).double()
    assert torch.equal(mine.dense(), level(w.double(), scale, LEVELS["nf4"]).float())


def test_an_input_that_is_always_zero_and_a_block_of_zeros_are_no_trouble():
    x, w = inputs(), noise(OUT, IN)
    x[:, 5] = 0
    w[:4] = 0
    mine = calibrated(QUANTISED["nf4"], w, inverse_factor(second_moment(x)), torch.float32, 32, True)
    assert bool(mine.dense().isfinite().all())
    plain = calibrated(QUANTISED["nf4"], w, inverse_factor(second_moment(x)), torch.float32, 32)
    assert not bool(plain.dense()[:4].any())


def test_half_precision_inputs_sum_in_float32():
    x = inputs(9000).bfloat16()
    torch.testing.assert_close(second_moment(x).double(), x.double().T @ x.double() / 9000, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_calibrated_is_refused():
    x, w = inputs(), noise(OUT, IN)
    factor = inverse_factor(second_moment(x))
    w[3, 7] = torch.nan
    with pytest.raises(BaseError, match="NaN or infinity cannot be quantised"):
        calibrated(QUANTISED["nf4"], w, factor, torch.float32)
    with pytest.raises(BaseError, match="a block of 48 values"):
        calibrated(QUANTISED["nf4"], noise(OUT, IN), factor, torch.float32, 48)
    x[0, 0] = torch.inf
    with pytest.raises(BaseError, match="its inputs hold NaN or infinity"):
        second_moment(x)


@pytest.mark.parity
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_reads_calibrated_entries(name, double):
    from bitsandbytes.functional import QuantState, dequantize_4bit

    for shape, block in (((67, 128), 64), ((7, 37), 32)):
        w, x = noise(*shape), inputs(500, shape[1])
        mine = calibrated(QUANTISED[name], w, inverse_factor(second_moment(x)), torch.float32, block, double)
        entries = mine.entries()
        packed = entries.pop("weight")
        state = QuantState.from_dict({k.removeprefix("weight."): v for k, v in entries.items()}, device="cpu")
        # the scale may be dequantised in another order of one product and one sum
        torch.testing.assert_close(mine.dense(), dequantize_4bit(packed, state), rtol=3e-7, atol=3e-7)
        assert torch.equal(QUANTISED[name].from_entries(mine.entries()).dense(), mine.dense())
