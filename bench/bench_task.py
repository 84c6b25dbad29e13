"""How accurate is a recipe's adapter on its test rows, and what did it cost, over several seeds?

The naive answer it must beat: TRL + PEFT on the same rows (peers/trl_supersense.py; its row is beside ours in
bench/results). What would change our mind: a median outside 0.02 of the peer's.

    .venv/bin/python bench/bench_task.py --recipe recipes/supersense.yaml --test data/supersense/test.jsonl \\
        --seeds 0 1 2

Each seed is `deltaw train` and `deltaw eval` as a user calls them, in runs/bench/<recipe>-<seed>; a run that is there
is not trained again. Prints each row and the median; appends one JSON row a seed to bench/results/<recipe>.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deltaw.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent


def deltaw(*words: object) -> dict[str, Any]:
    """Run one command with --json; its last line."""
    command = [str(Path(sys.executable).parent / "deltaw"), *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--recipe", type=Path, required=True)
    p.add_argument("--test", type=Path, required=True)
    p.add_argument("--metric", default="exact")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of the recipe")
    args = p.parse_args()
    recipe = load_recipe(args.recipe, args.set)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    values = []
    for seed in args.seeds:
        out = (
            ROOT / "runs" / "bench" / "-".join([args.recipe.stem, *(s.replace("=", "_") for s in args.set), str(seed)])
        )
        was_there = (out / "done.json").exists()
        done = deltaw("train", args.recipe, *args.set, f"train.seed={seed}", "--out", out)
        b = recipe.base
        kept = ["--format", b.format, "--block", b.block, *(["--double-quant"] if b.double_quant else [])]
        result = deltaw("eval", "--base", b.path, *kept, "--adapter", out, "--data", args.test, "--metric", args.metric)
        identity = json.loads((out / "run.json").read_text())
        row = {
            "bench": args.recipe.stem,
            "tool": "deltaw",
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "commit": None
            if was_there
            else git.stdout.strip() or None,  # which commit trained a run that was there is not known
            "machine": identity["machine"] | {"cpu": platform.processor() or None},
            "versions": identity["versions"],
            "seed": seed,
            "settings": identity["recipe"],
            "train_seconds": done["seconds"],
            "tokens": done["tokens"],
            "tokens_per_s": done["tokens_per_s"],
            "peak_rss_mb": done["peak_rss_mb"],
            "eval_seconds": result["seconds"],
            "metric": args.metric,
            "value": result["value"],
            "n": result["n"],
        }
        values.append(result["value"])
        print(
            f"seed {seed}: {args.metric} {result['value']:.4f} on {result['n']} rows, {done['seconds']:.0f} s",
            flush=True,
        )
        with open(ROOT / "bench" / "results" / f"{args.recipe.stem}.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
    print(f"median {statistics.median(values):.4f} of {len(values)} seeds")


if __name__ == "__main__":
    main()
