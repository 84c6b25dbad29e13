"""Which method, for what it costs? Every method on two tasks under one budget of tokens.

The naive answer it must beat: always LoRA at rank 16 on every linear map. What would change our mind: another method
that is as accurate on both tasks at less memory, time or size, on several seeds.

    .venv/bin/python bench/bench_methods.py [--methods lora dora] [--tokens 60000] [--limit 200] [--seed 0]

Each method trains with its default learning rate through `deltaw train` in a process of its own and is judged by
`deltaw eval`: the task's exact matches, general questions (data/general_mcq) and the perplexity of Wikipedia text. Rows
go to bench/results/methods.jsonl; the table goes to README.md and docs/methods/index.md, between their marks, with
exact matches, general questions and perplexity as bench_quality.py found them over seeds. `--table` writes only tables.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench_quality import RESULTS as QUALITY
from bench_quality import first, newest, spread
from method_settings import LORA_LIKE, METHODS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "methods.jsonl"
BASE = "smollm2-135m-instruct"
TASKS = ("supersense", "address_json")
FORGETTING = {"general": ("data/general_mcq/questions.jsonl", "choice"), "wiki": ("data/ppl/wiki.jsonl", "perplexity")}
MARKS = re.compile(r"(<!-- methods: begin -->\n).*?(<!-- methods: end -->)", re.DOTALL)


def deltaw(*words: object) -> dict[str, Any]:
    """Run one command with --json; its last line."""
    command = [str(Path(sys.executable).parent / "deltaw"), *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def judge(task: str, limit: int, base: str, adapter: str | None, how: dict[str, Any]) -> dict[str, float]:
    """Exact matches on the task, general questions right, perplexity of Wikipedia; as `deltaw eval` computes them."""
    import deltaw
    from deltaw.data.source import read_rows
    from deltaw.train.evaluate import data_spec, evaluate_rows

    model = deltaw.load_base(base, how.get("format", "dense"), "auto", double_quant=how.get("double_quant", False))
    if adapter is not None:
        model.attach(adapter)
    spec = data_spec(model, None, 2048)
    files = {"exact": (f"data/{task}/test.jsonl", "exact"), **FORGETTING}
    return {
        name: evaluate_rows(model, read_rows(ROOT / file)[:limit], metric, spec)["value"]
        for name, (file, metric) in files.items()
    }


def judged(*arguments: object) -> dict[str, float]:
    """`judge` in a process of its own, so that what one model leaves behind does not slow the next."""
    command = [sys.executable, __file__, "--judge", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def recipe(label: str, task: str, tokens: int, seed: int) -> dict[str, Any]:
    """What `label` adds to a run of so many tokens on a task."""
    chosen = METHODS[label]
    return {
        "base": {"path": BASE, **chosen.get("base", {})},
        "adapter": chosen["adapter"],
        "data": {"train": str(ROOT / "data" / task / "train.jsonl"), "max_tokens": 512},
        "train": {
            "steps": max(1, round(tokens / 1024)),
            "tokens_per_step": 1024,
            "seed": seed,
            "save_every_s": 1e6,
            **chosen.get("train", {}),
        },
        "eval": {"keep": "last"},
    }


def one(label: str, task: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a method on a task and judge it: a row."""
    out = ROOT / "runs" / "bench-methods" / f"{label}-{task}-{args.seed}"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yaml"
    file.write_text(json.dumps(recipe(label, task, args.tokens, args.seed)))  # JSON is YAML
    done = deltaw("train", file, "--out", out)
    run = json.loads((out / "run.json").read_text())
    start = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    if done["adapter"]:
        b = METHODS[label].get("base", {})
        where: list[Any] = [BASE, done["adapter"], b]
        size = (Path(done["adapter"]) / "adapter_model.safetensors").stat().st_size
    else:
        where = [done["model"], None, {}]
        size = sum(f.stat().st_size for f in Path(done["model"]).glob("*.safetensors"))
    n_base = deltaw("inspect", BASE)["n_parameters"]
    row = {
        "method": label,
        "task": task,
        "trainable": start["parameters"],
        "trainable_percent": 100 * start["parameters"] / n_base,
        "lr": run["recipe"]["train"]["lr"],
        "train_seconds": done["seconds"],
        "tokens": done["tokens"],
        "peak_rss_mb": done["peak_rss_mb"],
        "size_mb": size / 1e6,
        **judged(task, args.limit, *where),
        "machine": run["machine"] | {"cpu": platform.processor() or None},
        "versions": run["versions"],
        "settings": run["recipe"],
    }
    shutil.rmtree(out)  # a whole model each for full and galore
    return row


def rows_there() -> dict[tuple[str, str], dict[str, Any]]:
    """The newest row of each method and task."""
    if not RESULTS.is_file():
        return {}
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {(row["method"], row["task"]): row for row in lines}


def table() -> str:
    """What each method costs, by the newest rows, beside how good it is over seeds (bench_quality.py's rows)."""
    rows, judged_rows = rows_there(), newest(QUALITY)
    lines = [
        "| method | trains | supersense | address_json | general questions | wiki perplexity | seconds | "
        "peak memory, MB | file, MB | mergeable |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label in ("base", *METHODS):
        there = [rows[label, task] for task in TASKS if (label, task) in rows]
        good = [[r for k, r in judged_rows.items() if k[:3] == ("methods", label, task)] for task in TASKS]
        if not there or not any(good):
            continue
        trained = label != "base"
        cells = [
            label,
            f"{there[0]['trainable_percent']:.3g} %" if trained else "",
            *map(spread, good),
            *(first(good, name, form) for name, form in (("general", "{:.3f}"), ("wiki", "{:.1f}"))),
            ", ".join(f"{row['train_seconds']:.0f}" for row in there) if trained else "",
            f"{max(row['peak_rss_mb'] for row in there):,.0f}" if trained else "",
            f"{there[0]['size_mb']:.3g}" if trained else "",
            mergeable(METHODS[label]["adapter"]) if trained else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def mergeable(adapter: dict[str, Any]) -> str:
    """What the table says of merging."""
    from deltaw.methods import method_class

    method = method_class(adapter["method"])
    if adapter.get("add"):
        return "no: it adds biases"
    return "is a model" if method.trains_base else "yes" if method.mergeable else "no"


def write_tables() -> None:
    """Put the table between its marks, and write the lab's tables."""
    from lab_tables import write_lab_tables

    write_lab_tables()
    for page in (ROOT / "README.md", ROOT / "docs" / "methods" / "index.md"):
        text = page.read_text(encoding="utf-8")
        assert MARKS.search(text), f"{page} has no marks"
        page.write_text(MARKS.sub(lambda m: f"{m[1]}{table()}\n{m[2]}", text), encoding="utf-8")


def verdict() -> None:
    """Say what fell short of what is asked."""
    rows = rows_there()
    for task in TASKS:
        if ("base", task) not in rows or ("full", task) not in rows:
            continue
        base, full = rows["base", task]["exact"], rows["full", task]["exact"]
        for label in METHODS:
            row = rows.get((label, task))
            if row is not None and row["exact"] < base:
                print(f"{label} on {task}: {row['exact']:.3f}, worse than the base's {base:.3f}")
            if row is not None and label in LORA_LIKE and row["exact"] < full - 0.03:
                print(f"{label} on {task}: {row['exact']:.3f}, more than 0.03 below full's {full:.3f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--methods", nargs="+", default=["base", *METHODS], choices=["base", *METHODS])
    p.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    p.add_argument("--tokens", type=int, default=60_000)
    p.add_argument("--limit", type=int, default=200, help="rows of each evaluation")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--table", action="store_true", help="only write the tables")
    p.add_argument("--judge", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.judge:
        print(json.dumps(judge(*json.loads(args.judge))))
        return
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    for label in [] if args.table else args.methods:
        for task in args.tasks:
            if label == "base":
                row = {"method": label, "task": task, **judged(task, args.limit, BASE, None, {})}
            else:
                row = one(label, task, args)
            row = {
                "bench": "methods",
                "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "commit": git.stdout.strip() or None,
                "seed": args.seed,
                "limit": args.limit,
                "budget": args.tokens,
                **row,
            }
            with open(RESULTS, "a") as file:
                file.write(json.dumps(row) + "\n")
            took = f"  {row['train_seconds']:.0f} s  {row['peak_rss_mb']:.0f} MB" if label != "base" else ""
            scores = f"exact {row['exact']:.3f}  general {row['general']:.3f}  wiki {row['wiki']:.2f}"
            print(f"{label:10} {task:13} {scores}{took}", flush=True)
    write_tables()
    verdict()


if __name__ == "__main__":
    main()
