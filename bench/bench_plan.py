"""Does `deltaw plan` say what a run takes?

The naive answer it must beat: weights and optimizer states alone, without activations. What would change our mind: a
planned peak more than 10 % from the measured one, or a growth after loading more than 15 % from it.

    .venv/bin/python bench/bench_plan.py [--only WORD] [--steps 4]

Each row is a fresh process that loads a base and takes real steps on random rows: SmolLM2-135M (the starter base) and,
with random weights, the shapes of SmolLM2-360M and GPT-2 in the cache's folder `bench`. Prints a table; appends one
JSON row each to bench/results/plan.jsonl.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaw.core.fingerprint import cache_dir
from deltaw.model.load import resolve_base
from deltaw.plan.network import shapes
from deltaw.train import run  # noqa: F401  (the planner's process imports what a run imports)
from deltaw.train.checkpoint import machine, versions
from deltaw.train.measure import compared, measured
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe

RESULTS = Path(__file__).resolve().parent / "results" / "plan.jsonl"
SMALL, MEDIUM, OTHER = "smollm2-135m-instruct", "smollm2-360m", "gpt2"
LORA: dict[str, Any] = {"method": "lora", "rank": 16}
QV: dict[str, Any] = {"method": "lora", "rank": 64, "targets": ["q_proj", "v_proj"], "rslora": True}
NF4 = {"format": "nf4", "double_quant": True}
BF16 = {"dtype": "bfloat16"}

# base, settings of the base, adapter, rows, tokens, share that is learned, settings of the step
CONFIGS: list[tuple[str, dict[str, Any], dict[str, Any], int, int, float, dict[str, Any]]] = [
    (SMALL, BF16, LORA, 4, 256, 0.5, {}),
    (SMALL, BF16, LORA, 8, 256, 1.0, {"checkpointing": True}),
    (SMALL, {"dtype": "float32"}, LORA, 4, 128, 1.0, {}),
    (SMALL, NF4 | BF16, LORA, 4, 256, 1.0, {}),
    (SMALL, NF4 | BF16, QV, 2, 1024, 0.5, {"checkpointing": True}),
    (SMALL, {"format": "int8"} | BF16, QV, 4, 512, 0.5, {}),
    (SMALL, {"dtype": "float32"}, {"method": "full"}, 2, 256, 1.0, {}),
    (SMALL, {"dtype": "float32"}, {"method": "full"}, 4, 512, 0.5, {"checkpointing": True, "micro_tokens": 512}),
    (MEDIUM, BF16, LORA, 4, 256, 0.5, {}),
    (MEDIUM, BF16, QV, 2, 1024, 0.5, {}),
    (MEDIUM, BF16, LORA, 8, 256, 1.0, {"checkpointing": True}),
    (MEDIUM, NF4 | BF16, LORA, 4, 256, 0.5, {}),
    (MEDIUM, NF4 | BF16, LORA, 8, 512, 0.5, {"checkpointing": True, "micro_tokens": 1024}),
    (MEDIUM, {"format": "int8"} | BF16, QV, 4, 256, 1.0, {"checkpointing": True}),
    (MEDIUM, {"dtype": "float32"}, {"method": "full"}, 2, 256, 1.0, {}),
    (MEDIUM, {"dtype": "float32"}, {"method": "full"}, 2, 256, 1.0, {"checkpointing": True}),
    (OTHER, BF16, LORA, 4, 256, 1.0, {}),
    (OTHER, NF4 | BF16, LORA, 2, 1024, 1.0, {"checkpointing": True}),
]


def base_of(name: str) -> Path:
    """The folder of the starter, or of a shape with random bfloat16 weights and the starter's tokenizer."""
    starter = resolve_base(SMALL)
    if name == SMALL:
        return starter
    folder = cache_dir() / "bench" / name
    if not (folder / "model.safetensors").is_file():
        config = AutoConfig.for_model(**shapes()[name])
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(starter / file, folder / file)
    return folder


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="configurations whose line holds this word")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--dry", action="store_true", help="print only, keep no rows")
    args = p.parse_args()
    print(f"{'configuration':64s} {'peak':>14s} {'error':>7s} {'growth':>14s} {'error':>7s}")
    for name, base, adapter, rows, length, learned, step in CONFIGS:
        label = f"{name} {base.get('format', 'dense')} {base['dtype']} {adapter['method']}"
        label += f" r{adapter['rank']} {'qv' if 'targets' in adapter else 'all'}" if "rank" in adapter else ""
        label += f" {rows}x{length}" + "".join(f" {k}" if v is True else f" {k}={v}" for k, v in step.items())
        if args.only not in label:
            continue
        recipe = load_recipe({"base": base | {"path": str(base_of(name))}, "adapter": adapter, "train": step})
        planner = Planner(recipe, Work.of_rows(rows, length, learned))
        plan = planner.plan()
        found = measured(planner, recipe, args.steps)
        errors = compared(plan, found)
        peak, growth = errors["peak"], errors["growth"]
        print(
            f"{label:64s} {peak['planned'] / 1e6:6.0f} /{peak['measured'] / 1e6:6.0f} {peak['error']:+7.1%} "
            f"{growth['planned'] / 1e6:6.0f} /{growth['measured'] / 1e6:6.0f} {growth['error']:+7.1%}",
            flush=True,
        )
        row = {"label": label, "learned": learned, "planned": plan.plain(), "measured": found, "errors": errors}
        row |= {"versions": versions(), "machine": machine()}
        if args.dry:
            continue
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
