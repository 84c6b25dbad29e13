"""Methods x formats x architectures: every pair of two of them meets in some row, and each row trains and saves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from contract_cases import TRAINS_BASE, randomise

from deltaw.data.template import Example
from deltaw.formats import FORMATS, QUANTISED
from deltaw.methods import METHODS, method_class
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.store.peft import read_adapter, write_adapter
from deltaw.train.loss import sft
from deltaw.train.step import step_gradient
from models import ARCHITECTURES, EMBEDDING, make_ids, make_net

IDS = make_ids()
KINDS = (*ARCHITECTURES, "gemma2")
NORM = {"gpt2": "ln_1", "opt": "layer_norm", "gpt_neox": "layernorm", "phi": "layernorm"}
ROWS = [Example(tuple(range(5, 18)), (False,) * 5 + (True,) * 8, "one"), Example((9, 3, 2), (False, True, True), "two")]
SMALL: dict[str, dict[str, Any]] = {
    "bitfit": {"add": True},
    "houlsby": {"bottleneck": 5},
    "ia3": {},
    "prefix": {"n_tokens": 3},
    "prompt": {"n_tokens": 3},
    "ptuning": {"n_tokens": 3, "hidden": 7},
    "vera": {"rank": 5},
}


def cover() -> list[tuple[str, str, str]]:
    """Rows of (method, format, architecture) in which every two values meet, chosen greedily."""
    methods = [m for m in METHODS if m.name not in TRAINS_BASE]
    allowed = [
        (m.name, f, kind)
        for m, f, kind in itertools.product(methods, FORMATS, KINDS)
        if m.formats is None or f in m.formats
    ]
    missing = {pair for row in allowed for pair in pairs(row)}
    rows = []
    while missing:
        best = max(allowed, key=lambda row: len(pairs(row) & missing))
        rows.append(best)
        missing -= pairs(best)
    return rows


def pairs(row: tuple[str, str, str]) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return set(itertools.combinations(enumerate(row), 2))


def settings(method: str, kind: str) -> dict[str, Any]:
    if method == "longlora":
        return {
            "rank": 3,
            "group_least": 4,
            "save_modules": (EMBEDDING.get(kind, "embed_tokens"), NORM.get(kind, "norm")),
        }
    return SMALL.get(method, {"rank": 3, "alpha": 5})


def model_of(kind: str, format: str) -> Model:
    net = make_net(kind)
    return Model(quantise_network(net, Format(format, 32, True)) if format in QUANTISED else net)


def test_the_cover_has_every_pair():
    rows = cover()
    met = {pair for row in rows for pair in pairs(row)}
    adapters = [m.name for m in METHODS if m.name not in TRAINS_BASE]
    for one, other in ((adapters, list(FORMATS)), (adapters, KINDS), (list(FORMATS), KINDS)):
        assert len(one) > 4
        assert all(any({a, b} <= {v for _, v in pair} for pair in met) for a in one for b in other)
    assert len(rows) < len(adapters) * len(KINDS) * 2


@pytest.mark.parametrize(("method", "format", "kind"), cover())
def test_it_trains_and_is_saved(method, format, kind, tmp_path):
    model = model_of(kind, format)
    with torch.no_grad():
        base = model.logits(IDS)
    model.attach(method_class(method)(**settings(method, kind)))
    randomise(model, size=0.1)
    step_gradient(model, ROWS, sft)
    assert all(bool(t.grad.isfinite().all()) and bool(t.grad.any()) for t in model.trainable().values())
    write_adapter(model.adapter(), tmp_path / "a")
    again = model_of(kind, format)
    again.attach(read_adapter(tmp_path / "a"))
    with torch.no_grad():
        changed = model.logits(IDS)
        assert torch.equal(again.logits(IDS), changed)
        assert float((changed - base).abs().max()) > 1e-3
        model.detach()
        assert torch.equal(model.logits(IDS), base)
