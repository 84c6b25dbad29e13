"""Does `deltaw plan` say what a run takes?

The naive answer it must beat: weights and optimizer states alone, without activations. What would change our mind: a
planned peak more than 10 % from the measured one, or a growth after loading more than 15 % from it.

    .venv/bin/python bench/bench_plan.py [--only WORD] [--steps 4] [--draw 24 --seed 7]

Each row is a fresh process that loads a base and takes real steps on random rows: SmolLM2-135M (the starter base) and,
with random weights, the shapes of SmolLM2-360M and GPT-2 in the cache's folder `bench`. --draw measures configurations
drawn at random instead (plan_draws.py). Prints a table; appends one JSON row each to bench/results/plan.jsonl.
`--table` writes the newest row of each configuration into docs/planner.md, between its marks.
"""

from __future__ import annotations

import argparse
import json
import re
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
from plan_draws import DRAWN, Case, draw

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "plan.jsonl"
MARKS = re.compile(r"(<!-- plan: begin -->\n).*?(<!-- plan: end -->)", re.DOTALL)
SMALL, MEDIUM, OTHER = "smollm2-135m-instruct", "smollm2-360m", "gpt2"
LORA: dict[str, Any] = {"method": "lora", "rank": 16}
QV: dict[str, Any] = {"method": "lora", "rank": 64, "targets": ["q_proj", "v_proj"], "rslora": True}
NF4 = {"format": "nf4", "double_quant": True}
BF16 = {"dtype": "bfloat16"}

CONFIGS = [
    Case(SMALL, BF16, LORA, 4, 256, 0.5, {}),
    Case(SMALL, BF16, LORA, 8, 256, 1.0, {"checkpointing": True}),
    Case(SMALL, {"dtype": "float32"}, LORA, 4, 128, 1.0, {}),
    Case(SMALL, NF4 | BF16, LORA, 4, 256, 1.0, {}),
    Case(SMALL, NF4 | BF16, QV, 2, 1024, 0.5, {"checkpointing": True}),
    Case(SMALL, {"format": "int8"} | BF16, QV, 4, 512, 0.5, {}),
    Case(SMALL, {"dtype": "float32"}, {"method": "full"}, 2, 256, 1.0, {}),
    Case(SMALL, {"dtype": "float32"}, {"method": "full"}, 4, 512, 0.5, {"checkpointing": True, "micro_tokens": 512}),
    Case(MEDIUM, BF16, LORA, 4, 256, 0.5, {}),
    Case(MEDIUM, BF16, QV, 2, 1024, 0.5, {}),
    Case(MEDIUM, BF16, LORA, 8, 256, 1.0, {"checkpointing": True}),
    Case(MEDIUM, NF4 | BF16, LORA, 4, 256, 0.5, {}),
    Case(MEDIUM, NF4 | BF16, LORA, 8, 512, 0.5, {"checkpointing": True, "micro_tokens": 1024}),
    Case(MEDIUM, {"format": "int8"} | BF16, QV, 4, 256, 1.0, {"checkpointing": True}),
    Case(MEDIUM, {"dtype": "float32"}, {"method": "full"}, 2, 256, 1.0, {}),
    Case(MEDIUM, {"dtype": "float32"}, {"method": "full"}, 2, 256, 1.0, {"checkpointing": True}),
    Case(OTHER, BF16, LORA, 4, 256, 1.0, {}),
    Case(OTHER, NF4 | BF16, LORA, 2, 1024, 1.0, {"checkpointing": True}),
]


def base_of(name: str) -> Path:
    """The folder of the starter, or of a shape with random bfloat16 weights and the starter's tokenizer."""
    starter = resolve_base(SMALL)
    if name == SMALL:
        return starter
    folder = cache_dir() / "bench" / name
    if not (folder / "model.safetensors").is_file():
        config = AutoConfig.for_model(**(DRAWN | shapes())[name])
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(starter / file, folder / file)
    return folder


def table() -> None:
    """Write the newest rows into docs/planner.md."""
    newest = {row["label"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}
    lines = [
        "| configuration | peak: planned / measured | error | growth after loading: planned / measured | error |",
        "|---|---|---|---|---|",
    ]
    for label, row in newest.items():
        said = (
            f"{e['planned'] / 1e6:,.0f} / {e['measured'] / 1e6:,.0f} | {e['error']:+.1%}"
            for e in (row["errors"]["peak"], row["errors"]["growth"])
        )
        lines.append(f"| {'' if row['seed'] is None else 'drawn: '}{label} | {' | '.join(said)} |")
    page = ROOT / "docs" / "planner.md"
    text = page.read_text()
    assert MARKS.search(text), f"{page} has no marks"
    page.write_text(MARKS.sub(lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="configurations whose line holds this word")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--dry", action="store_true", help="print only, keep no rows")
    p.add_argument("--draw", type=int, default=0, help="measure so many configurations drawn at random")
    p.add_argument("--seed", type=int, default=0, help="of the draw")
    p.add_argument("--first", type=int, default=0, help="leave out so many of them, which were measured before")
    p.add_argument("--table", action="store_true", help="write the table, run nothing")
    args = p.parse_args()
    if args.table:
        table()
        return
    cases = draw(args.draw, args.seed)[args.first :] if args.draw else CONFIGS
    print(f"{'configuration':84s} {'peak':>14s} {'error':>7s} {'growth':>14s} {'error':>7s}")
    for case in cases:
        if args.only not in case.label:
            continue
        name, base, adapter, rows, length, learned, step = case
        recipe = load_recipe({"base": base | {"path": str(base_of(name))}, "adapter": adapter, "train": step})
        planner = Planner(recipe, Work.of_rows(rows, length, learned))
        plan = planner.plan()
        found = measured(planner, recipe, args.steps)
        errors = compared(plan, found)
        peak, growth = errors["peak"], errors["growth"]
        print(
            f"{case.label:84s} {peak['planned'] / 1e6:6.0f} /{peak['measured'] / 1e6:6.0f} {peak['error']:+7.1%} "
            f"{growth['planned'] / 1e6:6.0f} /{growth['measured'] / 1e6:6.0f} {growth['error']:+7.1%}",
            flush=True,
        )
        row = {
            "label": case.label,
            "seed": args.seed if args.draw else None,
            "learned": learned,
            "planned": plan.plain(),
            "measured": found,
            "errors": errors,
        }
        row |= {"versions": versions(), "machine": machine()}
        if args.dry:
            continue
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
