"""Scales tuned towards the dense network: their gradient, nearer answers on text not learned from, the codes kept."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.core import fingerprint
from deltaw.errors import BaseError, DataError
from deltaw.formats import QUANTISED
from deltaw.merge.quantise import Calibration, quantise_base
from deltaw.model import tuned
from deltaw.model.base import load_base
from deltaw.model.describe import describe_base
from deltaw.model.frozen import FrozenLinear
from deltaw.model.load import load_transformers
from deltaw.model.quantised import Format, frozen_weights
from deltaw.model.tuned import HELD_OUT, Tuning, tune_scales
from merge.made_bases import rename, renamed_base
from train.tiny_runs import save_base

NF4 = Format("nf4", 64, True)
ROUGH = Format("int4", 256)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setitem(fingerprint._state, "cache", tmp_path / "cache")


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def _steps(monkeypatch):
    """Some 40 steps on the little text of these tests."""
    monkeypatch.setattr(tuned, "STEP_TOKENS", 64)
    monkeypatch.setattr(tuned, "RATE", 1e-2)


def tokens(n: int = 48) -> Tensor:
    """Text of 32 tokens a window."""
    return torch.randint(3, 250, (n, 32), generator=torch.Generator().manual_seed(0))


def pair(base: Path, how: Format, dtype: str = "float32"):
    return load_transformers(base, dtype, how), load_transformers(base, dtype)


def apart(net, dense, ids: Tensor) -> float:
    """The mean KL(dense || net), the slow way."""
    with torch.no_grad():
        p, q = (x(input_ids=ids, use_cache=False).logits.double().log_softmax(-1) for x in (dense, net))
    return float((p.exp() * (p - q)).sum(-1).mean())


def held_out(ids: Tensor) -> Tensor:
    return ids[HELD_OUT - 1 :: HELD_OUT]


@pytest.mark.parametrize(("name", "block", "double"), [("nf4", 64, True), ("int8", 32, False), ("fp4", 32, True)])
def test_the_gradient_is_that_of_the_dequantised_map(name, block, double):
    rng = torch.Generator().manual_seed(3)
    w, x, g = (torch.randn(*shape, generator=rng) for shape in ((7, 37), (2, 5, 37), (2, 5, 7)))  # a short last block
    frozen = QUANTISED[name].quantised(w, torch.float32, block, double)
    module = tuned._Tunable(FrozenLinear(frozen, nn.Parameter(torch.arange(7.0)), "linear"))
    with torch.no_grad():
        module.grown.copy_(torch.linspace(-0.4, 0.3, len(module.grown)))
    slow = module.grown.detach().clone().requires_grad_()
    grown = slow.repeat_interleave(block)[: w.numel()].view(w.shape).exp()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = module(mine), F.linear(theirs, frozen.dense() * grown, torch.arange(7.0))
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-5)  # 37 products of about 1, float32
    y.backward(g)
    wanted.backward(g)
    torch.testing.assert_close(module.grown.grad, slow.grad, rtol=0, atol=1e-4)  # 10 * 64 products of about 1
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "how"), [("llama", ROUGH), ("gpt2", Format("nf4", 32, True)), ("gemma2", NF4)])
@pytest.mark.usefixtures("_steps")
def test_answers_come_nearer_on_text_that_was_not_learned_from(kind, how, tmp_path):
    base, ids, said = save_base(tmp_path / "base", kind=kind), tokens(), []
    net, dense = pair(base, how)
    before = frozen_weights(net)
    first = apart(net, dense, held_out(ids))
    told = tune_scales(net, dense, ids, 2, said.append)
    after = frozen_weights(net)
    assert told == Tuning(2, held_out(ids).numel(), pytest.approx(first, rel=1e-3), told.after)
    assert told.after == pytest.approx(apart(net, dense, held_out(ids)), rel=1e-3)  # as it is stored
    assert told.after < 0.97 * told.before
    assert [line.partition(":")[0] for line in said] == [f"tuned scales, pass {n} of 2" for n in (1, 2)]
    for name, weight in after.items():
        assert torch.equal(weight.codes, before[name].codes), name
        assert (weight.block, weight.double_quant, weight.dtype) == (how.block, how.double_quant, torch.float32)
        now, then = (w.blocks.scales.plain() for w in (weight, before[name]))
        assert not torch.equal(now, then)
        assert bool((now > 0).all())
    assert not any(p.requires_grad for p in net.parameters())
    assert all(isinstance(net.get_submodule(name), FrozenLinear) for name in before)


@pytest.mark.usefixtures("_steps")
def test_it_is_the_same_every_time_and_in_half_precision_too(base):
    ids = tokens()
    first, again = (pair(base, ROUGH, "bfloat16")[0] for _ in range(2))
    dense = load_transformers(base, "bfloat16")
    told = [tune_scales(net, dense, ids) for net in (first, again)]
    assert told[0] == told[1]
    assert told[0].after < told[0].before
    for name, weight in frozen_weights(first).items():
        assert torch.equal(weight.absmax, frozen_weights(again)[name].absmax)


def test_scales_that_do_not_help_are_not_kept(base, monkeypatch):
    monkeypatch.setattr(tuned, "RATE", 3.0)
    net, dense = pair(base, NF4)
    before = frozen_weights(net)
    told = tune_scales(net, dense, tokens())
    assert told.after == told.before
    for name, weight in frozen_weights(net).items():
        assert weight is before[name]


def test_what_cannot_be_tuned_is_refused_and_the_network_is_as_it_was(base):
    net, dense = pair(base, NF4)
    before = frozen_weights(net)
    with pytest.raises(DataError, match=r"tuning has one window of 32 tokens: nothing would be left to judge it by"):
        tune_scales(net, dense, tokens(1))
    dense.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(BaseError, match="the divergence from the dense network is not finite"):
        tune_scales(net, dense, tokens())
    assert all(frozen_weights(net)[name] is weight for name, weight in before.items())
    with pytest.raises(DataError, match="calibration on 700 tokens in -1 passes is not possible"):
        Calibration("text.jsonl", 700, passes=-1)


def words(most: int, n: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    return " ".join(f"w{rng.randrange(most)}" for _ in range(n))


def test_a_folder_holds_the_tuned_scales_and_says_what_tuning_did(base, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words(40, 900)}) + "\n")
    told = {}
    for passes in (0, 1, 2):
        out = tmp_path / f"out{passes}"
        told[passes] = quantise_base(
            base, out, ROUGH, calibration=Calibration(out.with_name("text.jsonl"), 2000, passes)
        )
    nets = {passes: load_base(tmp_path / f"out{passes}") for passes in told}
    assert "tuned" not in told[0].calibration
    for passes in (1, 2):
        found = told[passes].calibration["tuned"]
        assert found["passes"] == passes
        assert found["after"] < found["before"]
        assert describe_base(tmp_path / f"out{passes}")["calibration"]["tuned"] == found
        assert nets[passes].fingerprint.differences(nets[0].fingerprint).keys() == {"codes"}
        for name, weight in frozen_weights(nets[passes].net).items():
            plain = frozen_weights(nets[0].net)[name]
            assert torch.equal(weight.codes, plain.codes)
            assert not torch.equal(weight.absmax, plain.absmax)


def test_a_base_whose_names_change_on_load_is_calibrated_as_one_whose_names_do_not(tmp_path):
    base, said = renamed_base(tmp_path / "base"), []
    same = rename(shutil.copytree(base, tmp_path / "same"), lambda k: k.replace("language_model.", ""))
    (tmp_path / "text.txt").write_text(words(53, 1500))
    text = Calibration(tmp_path / "text.txt")
    report = quantise_base(base, tmp_path / "out", NF4, calibration=text, say=said.append)
    assert report.calibration["maps"] == report.n_quantised == 14
    quantise_base(same, tmp_path / "wanted", NF4, calibration=text, say=said.append)
    assert sum("name maps in another way than the network" in line for line in said) == 1
    wanted = frozen_weights(load_base(tmp_path / "wanted").net)
    for name, weight in frozen_weights(load_base(tmp_path / "out").net).items():
        assert torch.equal(weight.codes, wanted[name].codes)
        assert torch.equal(weight.absmax, wanted[name].absmax)
