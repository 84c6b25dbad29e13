"""Encoders and encoder-decoders on a GPU train and answer as on the CPU."""

from __future__ import annotations

import pytest
from made_kinds import LABELS, NAMED, answered, labelled, save_base
from test_kinds_train import METHODS

from deltaw.data import DataSpec
from deltaw.data.source import Row
from deltaw.model.base import load_base
from deltaw.train.evaluate import evaluate_rows
from deltaw.train.events import Step
from deltaw.train.run import train

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_has_the_cpus_losses(kind, method, tmp_path):
    base = save_base(kind, tmp_path / "base", **(NAMED if kind == "bert" else {}))
    rows = labelled() if kind == "bert" else answered()
    spec = {k: v for k, v in METHODS[method].model_dump(mode="json").items() if k != "dropout"}
    spec |= {"targets": ["query", "value"] if kind == "bert" else ["k", "v"]} if method == "vera" else {}
    spec |= {"add": True} if method == "bitfit" else {}
    losses = {}
    for device in ("cpu", "cuda"):
        recipe = {
            "base": {"path": str(base), "dtype": "float32", "device": device},
            "adapter": {"method": METHODS[method].name, **{k: v for k, v in spec.items() if k != "method"}},
            "data": {"max_tokens": 20},
            "train": {"steps": 5, "tokens_per_step": 60, "lr": 0.01},
        }
        events = list(train(recipe, tmp_path / device, train_rows=rows))
        losses[device] = [e.loss for e in events if isinstance(e, Step)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=5e-3)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_answers_are_the_cpus(kind, tmp_path):
    base = save_base(kind, tmp_path / "base", **(NAMED if kind == "bert" else {}))
    plain = labelled(8) if kind == "bert" else answered(8)
    rows = [Row(source="test", line=i, **row) for i, row in enumerate(plain)]
    results = [
        evaluate_rows(
            load_base(base, device=device), rows, "choice", DataSpec(max_tokens=20), labels=LABELS, predictions=True
        )
        if kind == "bert"
        else evaluate_rows(load_base(base, device=device), rows, "exact", DataSpec(max_tokens=20), predictions=True)
        for device in ("cpu", "cuda")
    ]
    assert results[0]["predictions"] == results[1]["predictions"]
