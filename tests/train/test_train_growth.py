"""The norm of dW over the norm of W, as a run reports it."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import VALID, adapter_tensors, events_in, recipe, run

from deltaw.core.affine import Affine, merged
from deltaw.core.spec import MethodSpec
from deltaw.methods import Dora, Houlsby, Ia3, LongLora, Lora, PrefixTuning, Vera
from deltaw.model.base import load_base
from deltaw.train.growth import TIMES, growth, growth_due
from models import randomise

MADE: list[MethodSpec] = [
    Lora(rank=3, alpha=5),
    Lora(rank=3, alpha=5, start="pissa"),
    Dora(rank=2, alpha=3),
    LongLora(rank=2, alpha=3),
    Ia3(),
    Vera(rank=4),
]


@pytest.mark.parametrize("spec", MADE, ids=lambda s: f"{s.name}-{getattr(s, 'start', '')}")
@pytest.mark.parametrize("format", ["dense", "nf4"])
@torch.no_grad()
def test_train_growth_is_the_norm_of_merged_minus_base(base: Path, spec: MethodSpec, format: str):
    model = load_base(str(base), format, "float32")
    model.attach(spec, seed=0)
    randomise(model, size=0.05)
    changed = whole = 0.0
    for made in model.adapters.values():
        for name in made.sites:
            W = model.places.weight_at(made.places[name]).dense(torch.float64)
            form = made.lowered(name, model.places)
            parts = {p: getattr(form, p) for p in ("A", "B", "out_gain", "in_gain")}
            after, _ = merged(Affine(scale=form.scale, **parts), W)
            changed += float((after - W).square().sum())
            whole += float(W.square().sum())
    found = growth(model)
    assert found is not None
    assert found == pytest.approx(math.sqrt(changed / whole), rel=1e-4)
    assert found > 0.001


@pytest.mark.parametrize("spec", [Houlsby(), PrefixTuning(n_tokens=3)], ids=lambda s: s.name)
def test_train_growth_is_unknown_where_no_linear_map_changes(base: Path, spec: MethodSpec):
    model = load_base(str(base), dtype="float32")
    assert growth(model) is None
    model.attach(spec, seed=0)
    assert growth(model) is None


def test_train_growth_is_zero_at_the_start(base: Path):
    model = load_base(str(base), dtype="float32")
    model.attach(Lora(rank=3), seed=0)
    assert growth(model) == 0.0


@pytest.mark.parametrize(("n", "most"), [(1, 1), (6, 6), (20, 20), (21, 12), (1000, 21), (997, 21)])
def test_train_growth_is_due_at_both_ends_and_a_few_times_between(n: int, most: int):
    due = [step for step in range(1, n + 1) if growth_due(step, n)]
    assert due[0] == 1
    assert due[-1] == n
    assert len(due) == most <= TIMES + 1


def test_train_growth_in_the_events_is_that_of_the_saved_adapter(base: Path, tmp_path: Path):
    plain: dict[str, Any] = recipe(base, eval={"keep": "last"})
    run(plain, tmp_path / "run", valid=VALID)
    steps = events_in(tmp_path / "run", "step")
    grown = [e["growth"] for e in steps]
    assert all(b > a > 0 for a, b in itertools.pairwise(grown))
    tensors = adapter_tensors(tmp_path / "run" / "adapter")
    places = load_base(str(base), dtype="float32").places
    changed = whole = 0.0
    for name in (n for n in tensors if n.endswith("lora_A.weight")):
        site = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = tensors[name.replace("lora_A", "lora_B")]
        changed += float((5 / 3 * B.double() @ tensors[name].double()).square().sum())
        whole += float(places.weights[site].dense(torch.float32).double().square().sum())
    assert grown[-1] == pytest.approx(math.sqrt(changed / whole), rel=1e-5)
