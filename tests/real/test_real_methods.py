"""Every method once on the real starter: a step that learns, a file, and the base again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaw.core.fingerprint import cache_dir, set_cache_dir
from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import encode_all
from deltaw.methods import METHODS, method_class
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter, write_adapter
from deltaw.train.loss import sft
from deltaw.train.step import mean_loss, step_gradient

ROWS = Path(__file__).parents[2] / "data" / "supersense" / "train.jsonl"
SETTINGS: dict[str, dict[str, Any]] = {"bitfit": {"add": True}}
ADAPTERS = [m.name for m in METHODS if not m.trains_base]

pytestmark = pytest.mark.starter


@pytest.fixture(scope="module")
def starter() -> Iterator[Model]:
    """The starter in float32; its cache is the one that `deltaw fetch` fills, whatever other tests have set."""
    before, named = cache_dir(), os.environ.get("DELTAW_CACHE")
    set_cache_dir(Path(named) if named else None)
    yield load_base("smollm2-135m-instruct")
    set_cache_dir(before)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_few_steps_learn_and_the_file_computes_the_same(starter, method, tmp_path):
    rows = encode_all(read_rows(ROWS)[:3], starter.tokenizer, DataSpec()).examples
    ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        base = starter.logits(ids)
    starter.attach(method_class(method)(**SETTINGS.get(method, {})))
    try:
        rate = starter.adapters["default"].spec.rate
        parameters = list(starter.trainable().values())
        optimizer = torch.optim.Adam(parameters, lr=rate)
        first = mean_loss(starter, rows, sft)
        for _ in range(3):
            optimizer.zero_grad()
            step_gradient(starter, rows, sft)
            optimizer.step()
        assert mean_loss(starter, rows, sft) < first
        write_adapter(starter.adapter(), tmp_path / "a")
        with torch.no_grad():
            trained = starter.logits(ids)
        assert float((trained - base).abs().max()) > 1e-3
    finally:
        starter.detach()
    starter.attach(read_adapter(tmp_path / "a"))
    with torch.no_grad():
        # what is saved was made without gradients; an LSTM's kernel then rounds otherwise
        torch.testing.assert_close(starter.logits(ids), trained, rtol=0, atol=1e-4)
    starter.detach()
    with torch.no_grad():
        assert torch.equal(starter.logits(ids), base)
