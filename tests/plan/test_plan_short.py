"""A plan of a few blocks, repeated, is the plan of all of them, field by field."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deltaw.plan.kept import Kept
from deltaw.plan.repeat import UNITS, Unlike, repeated
from deltaw.plan.timeline import Timeline
from deltaw.plan.trace import Tracer
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from models import make_net

RUNTIME = 400_000_000
LORA = {"method": "lora", "rank": 3, "alpha": 5}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "full": {"method": "full"},
    "dora": {"method": "dora", "rank": 3, "alpha": 5},
    "vera": {"method": "vera", "rank": 3},
    "houlsby": {"method": "houlsby", "bottleneck": 3},
}
DEPTH = {"gpt2": "n_layer"}
TYPES = {"gemma2": ["sliding_attention", "full_attention"], "qwen2": ["full_attention"], "qwen3": ["full_attention"]}
REPEATS = ("lora", "full")
"""Methods that are repeated in every architecture here; in some, the others have to be traced whole."""


def folder_of(folder: Path, kind: str, blocks: int, **changes: Any) -> str:
    """A config.json alone."""
    if kind in TYPES:
        changes = {"layer_types": (TYPES[kind] * blocks)[:blocks], **changes}
    net = make_net(kind, **{DEPTH.get(kind, "num_hidden_layers"): blocks, **changes})
    net.config.save_pretrained(folder)
    return str(folder)


def both(path: str, adapter: dict[str, Any], **parts: Any) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """The plan as it is made, that of every block, and whether the first was made from a few."""
    base = {"path": path, **parts.pop("base", {})}
    recipe = load_recipe({"base": base, "adapter": adapter, "train": {"tokens_per_step": 64, **parts}})
    work = Work([(9, 4), (16, 15), (5, 1)], [(12, 11), (7, 2)])
    planners = [Planner(recipe, work, RUNTIME, whole=whole) for whole in (False, True)]
    short, whole = (planner.plan().plain() for planner in planners)
    assert next(iter(planners[1]._kept.models.values())).short is None
    return short, whole, next(iter(planners[0]._kept.models.values())).short is not None


KINDS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "phi", "gpt2", "opt", "gpt_neox", "gemma2")


@pytest.mark.parametrize(
    ("kind", "method"),
    [*itertools.product(KINDS, REPEATS), *itertools.product(("llama", "phi", "gemma2"), ("dora", "vera", "houlsby"))],
)
def test_plan_short_is_the_whole_plan(kind: str, method: str, tmp_path: Path):
    path = folder_of(tmp_path, kind, 12 if kind == "gemma2" else 7)
    for again, dtype in ((False, "bfloat16"), (True, "float32")):
        short, whole, is_short = both(path, METHODS[method], checkpointing=again, base={"dtype": dtype})
        assert short == whole
        assert is_short or method not in REPEATS


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("adapter", "parts"),
    [
        (LORA, {"base": {"format": "nf4", "double_quant": True}}),
        (LORA, {"base": {"format": "int8", "dtype": "float32"}, "checkpointing": True}),
        (LORA, {"micro_tokens": 16}),
        (LORA | {"dropout": 0.1}, {"checkpointing": True}),
        (LORA, {"optimizer": {"paged": True, "resident_mb": 1}}),
        (LORA, {"optimizer": {"lora_plus_ratio": 16, "bits": 8}}),
        (LORA | {"targets": ["mlp.down_proj", "mlp.c_proj"]}, {}),
        ({"method": "full"}, {"optimizer": {"name": "galore", "rank": 4}, "micro_tokens": 16}),
        ({"method": "bitfit"}, {}),
        (LORA | {"start": "pissa"}, {}),
        (LORA | {"save_modules": ["norm"]}, {}),
        ({"method": "dora", "rank": 3, "alpha": 5}, {"micro_tokens": 16, "base": {"dtype": "bfloat16"}}),
        ({"method": "prompt"}, {"checkpointing": True}),
        ({"method": "prefix", "n_tokens": 3}, {}),
        ({"method": "prefix", "n_tokens": 3, "projection": False}, {"checkpointing": True, "micro_tokens": 16}),
        ({"method": "ptuning", "encoder": "lstm", "dropout": 0.1}, {"micro_tokens": 16}),
        ({"method": "longlora", "rank": 3, "save_modules": ["norm"]}, {}),
    ],
    ids=str,
)
def test_plan_short_is_whole_for_formats_optimizers_and_settings(kind: str, adapter: Any, parts: Any, tmp_path: Path):
    if "targets" in adapter:
        adapter = adapter | {"targets": adapter["targets"][kind == "gpt2" :][:1]}
    if "save_modules" in adapter:
        names = {"llama": ["norm", "embed_tokens"], "gpt2": ["ln_1", "ln_f"]}
        adapter = adapter | {"save_modules": names[kind]}
    short, whole, _ = both(folder_of(tmp_path, kind, 9), adapter, **dict(parts))
    assert short == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": "2-3"},
        {"targets": ["layers.4.mlp.up_proj", "q_proj"]},
        {"targets": r"model\.layers\.\d\.mlp\.up_proj"},
        {"exclude": ["layers.1.self_attn.q_proj"]},
        {"save_modules": ["layers.5.mlp.up_proj"], "targets": ["q_proj"]},
    ],
    ids=str,
)
def test_plan_short_is_not_used_where_blocks_are_told_apart(changes: dict[str, Any], tmp_path: Path):
    short, whole, is_short = both(folder_of(tmp_path, "llama", 11), {**LORA, **changes})
    assert not is_short
    assert short == whole


def test_plan_short_is_not_used_where_blocks_differ_or_are_few(tmp_path: Path):
    types = ["full_attention"] * 3 + ["sliding_attention"] * 5
    mixed = folder_of(tmp_path / "mixed", "qwen2", 8, use_sliding_window=True, sliding_window=6, layer_types=types)
    for path in (mixed, folder_of(tmp_path / "few", "llama", UNITS), folder_of(tmp_path / "odd", "gemma2", 11)):
        short, whole, is_short = both(path, LORA)
        assert not is_short
        assert short == whole


@pytest.mark.parametrize(("name", "method"), [("smollm2-135m", "lora"), ("gpt2", "full"), ("llama-7b", "longlora")])
def test_plan_short_is_whole_for_a_shipped_shape(name: str, method: str):
    short, whole, _ = both(name, METHODS.get(method, {"method": method}))
    assert short == whole
    assert short["moments"]["evaluation"]["workspace"] > 0


def line_of(sizes: list[int], *, backward: bool = True) -> Timeline:
    """A timeline of layers of these widths, on the meta device."""
    with torch.device("meta"):
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        x = torch.empty(3, sizes[0], requires_grad=True)
    known = [x, *(p for layer in layers for p in layer.parameters())]
    tracer = Tracer(known, None, {i: list(layer.parameters()) for i, layer in enumerate(layers)})
    with tracer:
        for layer in layers:
            x = torch.relu(layer(x))
        if backward:
            x.sum().backward()
    return tracer.ended(known)


def test_plan_short_repeats_a_timeline_and_refuses_units_that_differ():
    line = line_of([8] * (UNITS + 1))
    same, more = repeated(line, UNITS), repeated(line, 9)
    assert (same.events.tolist(), same.named) == (line.events.tolist(), line.named)
    traced = line_of([8] * 10)
    assert (more.events.tolist(), more.named) == (traced.events.tolist(), traced.named)
    with pytest.raises(Unlike, match="different things"):
        repeated(line_of([8, 8, 8, 10, 8, 8]), 9)
    backward = repeated(line_of([8] * (UNITS + 1), backward=False), 7)
    assert backward.events.tolist() == line_of([8] * 8, backward=False).events.tolist()


def test_plan_of_another_format_is_its_own_whatever_was_planned_before():
    """Some formats share a trace; each plan is as if nothing had been kept."""
    work, kept, shared = Work([(9, 4), (16, 15)], [(12, 11)]), Kept(), []
    for dtype, adapter in itertools.product(
        ("bfloat16", "float32"),
        (LORA, LORA | {"dropout": 0.1}, METHODS["dora"], METHODS["houlsby"], LORA | {"save_modules": ["norm"]}),
    ):
        alone: dict[tuple[bool, str], dict[str, Any]] = {}
        for formats in (("nf4", "dense", "int8"), ("dense", "nf4", "int8")):
            for again, form in itertools.product((False, True), formats):
                base = {"path": "smollm2-135m", "dtype": dtype, "format": form}
                recipe = load_recipe({"base": base, "adapter": adapter, "train": {"checkpointing": again}})
                before = len(kept.traces)
                found = Planner(recipe, work, RUNTIME, kept=kept).plan().plain()
                if (again, form) not in alone:
                    alone[again, form] = Planner(recipe, work, RUNTIME).plan().plain()
                assert found == alone[again, form]
                shared.append(len(kept.traces) == before)
            kept = Kept()
    assert any(shared)
    assert not all(shared)
