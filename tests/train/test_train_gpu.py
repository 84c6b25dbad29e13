"""A run on a GPU: the CPU's losses, the same files, resumed where it stopped; and what is said where there is none."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from tiny_runs import ROWS, VALID, recipe

import deltaw
from deltaw.data import DataSpec, Row
from deltaw.errors import BaseError, RecipeError
from deltaw.model.base import best_dtype, load_base
from deltaw.store.peft import read_adapter
from deltaw.train.evaluate import evaluate_rows
from deltaw.train.events import Done, Eval, Step
from deltaw.train.run import train

HOW: dict[str, dict[str, Any]] = {
    "lora": {},
    "dropout": {"adapter": {"dropout": 0.2}},
    "checkpointing": {"train": {"checkpointing": True, "micro_tokens": 20}},
    "prefix": {"adapter": {"method": "prefix", "n_tokens": 3}},
    "houlsby": {"adapter": {"method": "houlsby", "bottleneck": 5}},
    "longlora": {"adapter": {"method": "longlora", "rank": 3, "alpha": 5}},
    "pissa": {"adapter": {"start": "pissa"}},
    "eva": {"adapter": {"start": "eva"}},
    "full": {"adapter": {"method": "full"}},
    "galore": {"adapter": {"method": "full"}, "train": {"optimizer": {"name": "galore", "rank": 4}}},
    "plus": {"train": {"optimizer": {"name": "lora_plus"}}},
}


def on(base: Any, device: str, how: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return recipe(base, **{**how, "base": {"device": device}, "eval": {"metric": "exact"}})


def test_a_gpu_that_is_not_there_is_said(base, tmp_path):
    with pytest.raises(BaseError, match=r"cuda:99' is not there: found"):
        load_base(base, device="cuda:99")
    with pytest.raises(BaseError, match="unknown device 'gpu'"):
        load_base(base, device="gpu")
    with pytest.raises(BaseError, match="cuda:99"):
        next(train(recipe(base, base={"device": "cuda:99"}), tmp_path / "run", train_rows=ROWS))
    with pytest.raises(RecipeError, match="device"):
        next(train(recipe(base, base={"device": "gpu"}), tmp_path / "run", train_rows=ROWS))
    with pytest.raises(RecipeError, match="budget plans the memory of a run on the CPU"):
        next(train(recipe(base, base={"device": "cuda"}, budget={"memory_gb": 8}), tmp_path / "run", train_rows=ROWS))
    assert not (tmp_path / "run").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("how", HOW)
def test_a_run_has_the_cpus_losses_and_resumes(base, tmp_path, how):
    events = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        events[device] = list(train(on(base, device, HOW[how]), out, train_rows=ROWS, valid_rows=VALID))
    for kind, field, room in ((Step, "loss", 2e-3), (Eval, "value", 0.51), (Eval, "loss", 5e-3)):
        here, there = ([getattr(e, field) for e in events[d] if isinstance(e, kind)] for d in ("cpu", "cuda"))
        assert here
        assert there == pytest.approx(here, rel=room, abs=room), field
    done = events["cuda"][-1]
    assert isinstance(done, Done)
    if done.adapter is not None:
        assert all(not t.is_cuda for t in read_adapter(done.adapter).tensors().values())
    kept = recipe(base, **{**HOW[how], "base": {"device": "cuda"}})
    kept["train"]["save_every_s"] = 0
    out = tmp_path / "resumed"
    stopped = train(kept, out, train_rows=ROWS, valid_rows=VALID)
    list(islice(stopped, 6))
    stopped.close()
    again = [e for e in train(kept, out, train_rows=ROWS, valid_rows=VALID) if isinstance(e, Step)]
    whole = [e for e in events["cuda"] if isinstance(e, Step)]
    assert 0 < len(again) < len(whole)
    assert [e.loss for e in again] == pytest.approx([e.loss for e in whole[-len(again) :]], rel=1e-4)


@pytest.mark.gpu
def test_auto_is_bfloat16_on_a_gpu(base):
    assert best_dtype(device="cuda") == "bfloat16"
    model = load_base(base, dtype="auto", device="cuda")
    assert model.device.type == "cuda"
    assert model.net.dtype == torch.bfloat16
    model.attach(deltaw.Lora(rank=2))
    assert all(t.is_cuda and t.dtype == torch.float32 for t in model.trainable().values())


@pytest.mark.gpu
@pytest.mark.parametrize("metric", ["exact", "json", "choice", "perplexity"])
def test_every_metric_is_the_cpus(base, metric):
    rows = [Row(prompt=r["prompt"], completion='"yes"' if metric == "json" else r["completion"]) for r in VALID]
    here, there = (
        evaluate_rows(load_base(base, device=device), rows, metric, DataSpec(max_tokens=64), labels=["yes", "no"])
        for device in ("cpu", "cuda")
    )
    assert there["value"] == pytest.approx(here["value"], rel=1e-3)
