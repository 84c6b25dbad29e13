"""What does it cost to keep three quarters of the optimizer's states in a file?

The naive answer it must beat: states in memory, which is fastest; paged may be at most 10 % slower, for a quarter of
the memory. What would change our mind: a paged step over 1.1 times the other's, or more memory than the budget.

    .venv/bin/python bench/bench_paged.py [--steps 4] [--tokens 8192]

Full fine-tuning of the base in float32. The settings are workers of this process and step in turn, so that a shared
machine does not bend the ratio; a first step that makes the states is not counted. Prints a table; appends one JSON row
to bench/results/paged.jsonl. The states' file lies in --folder; it has no name and goes with its worker.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

from deltaw.model.load import resolve_base
from deltaw.train.checkpoint import machine, versions
from workers import HERE, Worker

SETTINGS: dict[str, dict[str, Any]] = {
    "resident": {},
    "paged": {"paged": True},
    "resident, 8 bits": {"bits": 8},
    "paged, 8 bits": {"paged": True, "bits": 8},
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--micro", type=int, default=1024)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--folder", type=Path, default=HERE)
    p.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    p.add_argument("--out", type=Path, default=HERE / "results" / "paged.jsonl")
    args = p.parse_args()
    shared = ["--base", str(resolve_base(args.base)), "--tokens", str(args.tokens), "--length", str(args.length)]
    shared += ["--micro", str(args.micro), "--threads", str(args.threads), "--folder", str(args.folder)]
    workers = {n: Worker("full_step.py", [*shared, "--optimizer", json.dumps(SETTINGS[n])]) for n in args.only}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(args.steps):
        for name, worker in workers.items():
            rows[name].append(worker.step())
            print(f"{name:18}", {k: v and round(v, 3) for k, v in rows[name][-1].items()}, flush=True)
    for worker in workers.values():
        worker.close()
    report(args, rows)


def report(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table and append the row."""
    found: dict[str, dict[str, Any]] = {}
    for name, steps in rows.items():
        seconds = [s["seconds"] for s in steps]
        ratios = [s["seconds"] / r["seconds"] for s, r in zip(steps, rows["resident"], strict=True)]
        found[name] = {
            "median_s": round(statistics.median(seconds), 2),
            "min_s": round(min(seconds), 2),
            "max_s": round(max(seconds), 2),
            "ratio": round(statistics.median(ratios), 3),
            "update_s": round(statistics.median([s["update_s"] for s in steps]), 3),
            "moved_mb": steps[-1]["moved_mb"],
            "held_mb": round(steps[-1]["held_mb"], 1),
            "anon_mb": steps[-1]["anon_mb"],
            "losses": [round(s["loss"], 6) for s in steps],
        }
        print(f"{name:18} {found[name]}")
    if "paged" in found:
        assert found["paged"]["losses"] == found["resident"]["losses"], "paged states give other numbers"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    row = {
        "bench": "paged",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "machine": machine() | {"cpu": platform.processor() or None},
        "versions": versions(),
        "sizes": {
            "base": args.base,
            "tokens": args.tokens,
            "length": args.length,
            "micro": args.micro,
            "threads": args.threads,
            "seed": 0,
        },
        "settings": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
