"""Runs that train virtual tokens: they learn, resume bit for bit, are planned, and count their positions."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_runs import ROWS, VALID, adapter_tensors, events_in, recipe, run, save_base

import deltaw
from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import Example
from deltaw.errors import BaseError, DataError
from deltaw.model.base import load_base
from deltaw.model.limits import refuse_beyond
from deltaw.model.model import Model
from deltaw.train.evaluate import evaluate_rows, log_likelihoods
from deltaw.train.events import Saved
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from models import make_net

N = 5
METHODS = {
    "prompt": {"method": "prompt", "n_tokens": N},
    "prompt from a text": {"method": "prompt", "n_tokens": N, "start": "text", "start_text": "yes or no"},
    "prefix": {"method": "prefix", "n_tokens": N, "projection": False},
    "prefix with a projection": {"method": "prefix", "n_tokens": N, "projection": True, "hidden": 7},
    "ptuning": {"method": "ptuning", "n_tokens": N, "hidden": 9},
    "ptuning by lstm": {"method": "ptuning", "n_tokens": N, "encoder": "lstm", "hidden": 16, "dropout": 0.1},
}


def plain(base: Path, method: str, **train: object) -> dict:
    return recipe(base, adapter=METHODS[method], train={"lr": 0.03, "save_every_s": 0, **train})


@pytest.mark.parametrize("method", METHODS)
def test_a_run_lowers_the_loss_and_its_adapter_gives_that_loss(base: Path, tmp_path: Path, method: str) -> None:
    wanted = plain(base, method, epochs=12, lr=0.1, save_every_s=1000) | {"eval": {"every_steps": 12}}
    run(wanted, tmp_path / "out", valid=VALID)
    losses = [e["loss"] for e in events_in(tmp_path / "out", "step")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    tensors = adapter_tensors(tmp_path / "out" / "adapter")
    assert list(tensors) == ["prompt_embeddings"]
    best = min(e["loss"] for e in events_in(tmp_path / "out", "eval"))
    model = load_base(base, "dense", "float32")
    model.attach(tmp_path / "out" / "adapter")
    found = evaluate_rows(model, read_rows(VALID), "perplexity", DataSpec(max_tokens=64))
    assert math.log(found["value"]) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_that_stopped_goes_on_bit_for_bit(base: Path, tmp_path: Path, method: str, checkpointing: bool) -> None:
    wanted = plain(base, method, micro_tokens=25, checkpointing=checkpointing)
    run(wanted, tmp_path / "whole")
    for event in (events := deltaw.train(wanted, tmp_path / "out", train_rows=ROWS)):
        if isinstance(event, Saved) and event.step == 3:
            break
    events.close()
    run(wanted, tmp_path / "out")
    assert events_in(tmp_path / "out", "start")[-1]["first_step"] == 3
    same = ("step", "loss", "grad_norm")
    found = [[[e[k] for k in same] for e in events_in(tmp_path / out, "step")] for out in ("out", "whole")]
    assert found[0] == found[1]
    mine, theirs = (adapter_tensors(tmp_path / out / "adapter") for out in ("out", "whole"))
    assert torch.equal(mine["prompt_embeddings"], theirs["prompt_embeddings"])


@pytest.mark.parametrize("method", METHODS)
def test_the_planner_traces_the_step_and_counts_what_trains_and_what_is_stored(base: Path, method: str) -> None:
    loaded = load_recipe(plain(base, method))
    plan = Planner(loaded, Work.of_rows(3, 20)).plan()
    model = load_base(base, "dense", "float32")
    model.attach(loaded.adapter)
    assert plan.counts.trainable == sum(t.numel() for t in model.trainable().values())
    assert plan.counts.stored == 4 * model.adapter().n_parameters
    longer = Planner(load_recipe({**plain(base, method), "adapter": {**METHODS[method], "n_tokens": 40}}),
                     Work.of_rows(3, 20)).plan()  # fmt: skip
    steps = [p.moments["step"] for p in (plan, longer)]  # whose peaks may be two moments: at the loss, in a backward
    kept = [at["activations"] + at["workspace"] for at in steps]
    assert kept[1] > 1.5 * kept[0], "virtual tokens take memory in each document"


def test_evaluation_in_a_run_generates_behind_virtual_tokens(base: Path, tmp_path: Path) -> None:
    wanted = plain(base, "prefix", epochs=2) | {"eval": {"metric": "exact", "every_steps": 3}}
    run(wanted, tmp_path / "out", valid=VALID)
    assert all(0 <= e["value"] <= 1 for e in events_in(tmp_path / "out", "eval"))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_learned_positions_count_virtual_tokens(tmp_path: Path, method: str) -> None:
    base = save_base(tmp_path / "gpt2", kind="gpt2")
    plan = {**plain(base, method), "adapter": {**METHODS[method], "n_tokens": 50}}
    longest = max(len(r["prompt"]) + len(r["completion"]) + 2 for r in ROWS)
    assert 14 < longest <= 64
    with pytest.raises(DataError, match=r"tokens behind 50 virtual tokens, and this base has 64 .* to 14 or less"):
        run(plan, tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()
    with pytest.raises(BaseError, match="64 positions beside 50 virtual tokens: use 14 or fewer"):
        Planner(load_recipe(plan), Work.of_rows(2, 15)).plan()
    Planner(load_recipe(plan), Work.of_rows(2, 14)).plan()


def test_positions_fit_exactly() -> None:
    net = make_net("opt")
    row = Example((3,) * 59, (False,) + (True,) * 58, "row")
    refuse_beyond(net, [row], 5)
    with pytest.raises(DataError, match="row: 59 tokens behind 6 virtual tokens"):
        refuse_beyond(net, [row], 6)
    model = Model(net)
    for settings in (deltaw.methods.Prompt(n_tokens=5), deltaw.methods.PrefixTuning(n_tokens=5, projection=False)):
        model.attach(settings)
        assert log_likelihoods(model, [row])[0] < 0
        model.detach()
        model.attach(settings.model_copy(update={"n_tokens": 6}))
        with pytest.raises(DataError, match="behind 6 virtual tokens"):
            log_likelihoods(model, [row])
        model.detach()
