"""Which learning rate suits each method by default?

The naive answer it must beat: one rate for all (LoRA's 5e-4). What would change our mind: a method whose best rate at
this budget is at an end of its grid, or loses to its neighbour on another seed.

    .venv/bin/python bench/bench_learning_rates.py [--methods lora vera] [--task supersense] [--tokens 15000] [--seed 0]
        [--set warmup_ratio=0.2] [--no-test]

Trains each method on a task at each rate of its grid, for one budget of tokens, and prints the loss and the exact
matches on validation rows, by which a rate is chosen, those on test rows, which are only reported, and the perplexity
of Wikipedia text, which says what was forgotten; appends a JSON row each to bench/results/learning_rates.jsonl.
`--set` changes other settings of a recipe's `train`, which the row and the table name.
`--table` writes the newest rows into docs/methods/index.md, between their marks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from method_settings import METHODS
from workers import identity

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("supersense", "address_json")
WIKI = ROOT / "data" / "ppl" / "wiki.jsonl"
RESULTS = ROOT / "bench" / "results" / "learning_rates.jsonl"
MARKS = re.compile(r"(<!-- rates: begin -->\n).*?(<!-- rates: end -->)", re.DOTALL)
GRIDS: dict[str, list[float]] = {
    "full": [1e-5, 3e-5, 1e-4, 3e-4],
    "galore": [1e-4, 3e-4, 1e-3, 3e-3],
    "lora": [2e-4, 5e-4, 1e-3, 2e-3],
    "lora+": [5e-5, 2e-4, 5e-4, 1e-3],
    "pissa": [5e-5, 2e-4, 5e-4, 1e-3],
    "qlora": [2e-4, 5e-4, 1e-3, 2e-3],
    "loftq": [2e-4, 5e-4, 1e-3, 2e-3],
    "dora": [2e-4, 5e-4, 1e-3, 2e-3],
    "longlora": [1e-4, 2e-4, 5e-4, 1e-3],
    "vera": [3e-3, 1e-2, 3e-2, 1e-1],
    "ia3": [3e-3, 1e-2, 3e-2, 1e-1],
    "bitfit": [1e-3, 3e-3, 1e-2, 3e-2],
    "houlsby": [3e-4, 1e-3, 3e-3, 1e-2],
    "parallel": [3e-4, 1e-3, 3e-3, 1e-2],
    "prefix": [3e-3, 1e-2, 3e-2, 1e-1],
    "ptuning": [1e-3, 3e-3, 1e-2, 3e-2],
    "prompt": [1e-2, 3e-2, 1e-1, 3e-1],
}


def one(label: str, lr: float, args: argparse.Namespace) -> dict[str, Any]:
    """Train and judge once, in this process."""
    import deltaw
    from deltaw.data.source import read_rows
    from deltaw.data.spec import DataSpec
    from deltaw.data.template import encode_all
    from deltaw.train.evaluate import evaluate_rows
    from deltaw.train.loss import sft
    from deltaw.train.recipe import load_recipe
    from deltaw.train.step import mean_loss

    chosen = METHODS[label]
    spec = DataSpec(max_tokens=512)
    recipe = {
        "base": {"path": "smollm2-135m-instruct", "dtype": "auto", **chosen.get("base", {})},
        "adapter": chosen["adapter"],
        "data": {"max_tokens": 512},
        "train": {
            "steps": max(1, round(args.tokens / 1024)),
            "tokens_per_step": 1024,
            "lr": lr,
            "seed": args.seed,
            "save_every_s": 1e6,
            **chosen.get("train", {}),
        },
        "eval": {"keep": "last"},
    }
    data = ROOT / "data" / args.task
    valid = read_rows(data / "valid.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"train.{change}" for change in args.set]
        *_, done = deltaw.train(recipe, Path(folder) / "run", overrides=changes, train_rows=data / "train.jsonl")
        b = recipe["base"]
        if done.adapter:
            model = deltaw.load_base(
                b["path"], b.get("format", "dense"), b["dtype"], double_quant=b.get("double_quant", False)
            )
            model.attach(done.adapter)
        else:
            model = deltaw.load_base(done.model, dtype=b["dtype"])
        examples = encode_all(valid, model.tokenizer, spec).examples
        loss = mean_loss(model, examples, sft)
        exact = evaluate_rows(model, valid[:100], "exact", spec)["value"]
        wiki = evaluate_rows(model, read_rows(WIKI), "perplexity", DataSpec(max_tokens=2048))["value"]
        judged = {"loss": loss, "exact": exact, "wiki": wiki}
        if args.test:
            judged["test"] = evaluate_rows(model, read_rows(data / "test.jsonl")[:200], "exact", spec)["value"]
    schedule = load_recipe(recipe, changes).train.schedule
    return judged | {"seconds": done.seconds, "tokens": done.tokens, "schedule": schedule}


def write_tables() -> None:
    """The short runs, a line for a method, and the long ones, a line for a run, between their marks."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    page = ROOT / "docs" / "methods" / "index.md"
    text = page.read_text(encoding="utf-8")
    assert MARKS.search(text), f"{page} has no marks"
    tables = f"{short([r for r in rows if 'wiki' not in r])}\n\n{long([r for r in rows if 'wiki' in r])}"
    page.write_text(MARKS.sub(lambda m: f"{m[1]}{tables}\n{m[2]}", text), encoding="utf-8")


def short(rows: list[dict[str, Any]]) -> str:
    """Loss and exact matches at each rate, one line a method."""
    from deltaw.methods import spec_from
    from deltaw.train.optim.settings import RATES

    newest = {(row["method"], row["lr"]): row for row in rows}
    lines = ["| method | default | validation loss (exact matches) at each rate |", "|---|---|---|"]
    for label in GRIDS:
        rates = sorted(lr for name, lr in newest if name == label)
        if not rates:
            continue
        optimizer = METHODS[label].get("train", {}).get("optimizer", {}).get("name")
        default = RATES.get(optimizer, spec_from(METHODS[label]["adapter"]).rate)
        cells = []
        for lr in rates:
            row = newest[label, lr]
            cells.append(f"{lr:g}: " + ("not finite" if "failed" in row else f"{row['loss']:.2f} ({row['exact']:.2f})"))
        lines.append(f"| {label} | `{default:g}` | {'; '.join(cells)} |")
    return "\n".join(lines)


def long(rows: list[dict[str, Any]]) -> str:
    """What each run on the budget of the comparison reached, and what it forgot."""
    lines = ["| method | task | rate | also | seed | validation loss | exact | exact on test rows | wiki perplexity |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        return list(GRIDS).index(r["method"]), r["task"], r["lr"], also(r), r["seed"]

    def also(r: dict[str, Any]) -> tuple[str, ...]:
        changes = r.get("set", [])
        schedule = r.get("schedule", "cosine")  # rows before it was noted, unless they set it
        named = (
            () if schedule == "cosine" or any("schedule" in change for change in changes) else (f"schedule={schedule}",)
        )
        return named + tuple(changes)

    newest = {place(r): r for r in rows}
    for key in sorted(newest):
        r = newest[key]
        judged = [
            f"{r['loss']:.3f}",
            f"{r['exact']:.2f}",
            f"{r['test']:.3f}" if "test" in r else "",
            f"{r['wiki']:.1f}",
        ]
        told = ", ".join(f"`{change}`" for change in also(r))
        lines.append("| " + " | ".join([r["method"], r["task"], f"{r['lr']:g}", told, str(r["seed"]), *judged]) + " |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    p.add_argument("--task", default=TASKS[0], choices=TASKS)
    p.add_argument("--rates", type=float, nargs="+", help="instead of the method's grid")
    p.add_argument("--tokens", type=int, default=15_000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe's train")
    p.add_argument("--test", action=argparse.BooleanOptionalAction, default=True, help="judge on test rows too")
    p.add_argument("--table", action="store_true", help="only write the tables")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.rates[0], args)))
        return
    if args.table:
        write_tables()
        return
    for label in args.methods:
        for lr in args.rates or GRIDS[label]:
            told_first = identity("learning_rates")
            command = [sys.executable, __file__, "--one", label, "--rates", str(lr)]
            command += ["--task", args.task, "--tokens", str(args.tokens), "--seed", str(args.seed)]
            command += [f"--set={change}" for change in args.set] + ([] if args.test else ["--no-test"])
            ended = subprocess.run(command, capture_output=True, text=True)
            if ended.returncode:
                lines = ended.stderr.strip().splitlines() or ["no message"]
                found: dict[str, Any] = {"failed": lines[-1]}  # a rate at which the loss is not finite is a result
                print(f"{label:10} {lr:8g}  {found['failed'][:90]}", flush=True)
            else:
                found = json.loads(ended.stdout.strip().splitlines()[-1])
                told = "  ".join(f"{k} {v if isinstance(v, str) else f'{v:.4g}'}" for k, v in found.items())
                print(f"{label:10} {args.task:12} {lr:8g}  {told}", flush=True)
            row = {
                **told_first,
                "method": label,
                "settings": METHODS[label],
                "task": args.task,
                "budget": args.tokens,
                "lr": lr,
                "set": args.set,
                "seed": args.seed,
                **found,
            }
            with open(RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
