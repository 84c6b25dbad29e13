"""Is our training step faster than HF PEFT's on the same machine, and in how much memory?

The naive answer it must beat: PEFT's eager step on SDPA, in the better of bf16 without and with autocast (give
`--autocast` to compare with the latter). What would change our mind: a ratio that moves by over 10 % between calls.

    .venv/bin/python bench/bench_train.py [--steps 5] [--batch 8] [--length 256]

Both tools are workers of this process and step in turn, so that a shared machine does not bend the ratio. The first
step of each is not counted. Prints a table; appends one JSON row to bench/results/train_step.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deltaw.model.load import resolve_base
from deltaw.train.checkpoint import machine, versions

HERE = Path(__file__).resolve().parent


class Worker:
    """A tool that does one step when asked."""

    def __init__(self, script: str, arguments: list[str]) -> None:
        command = [sys.executable, str(HERE / script), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read("ready")

    def _read(self, wanted: str | None = None) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line or (wanted and line != wanted):
            raise SystemExit(f"worker {self._process.args} said {line!r}; it ended with {self._process.poll()}")
        return line

    def step(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._read())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--autocast", action="store_true", help="PEFT under bf16 autocast, as TRL runs it")
    p.add_argument("--out", type=Path, default=HERE / "results" / "train_step.jsonl")
    args = p.parse_args()
    shared = ["--base", str(resolve_base(args.base)), "--batch", str(args.batch), "--length", str(args.length)]
    shared += ["--dtype", args.dtype]
    workers = {
        "deltaw": Worker("ours_step.py", shared),
        "peft": Worker("peers/peft_step.py", shared + (["--autocast"] if args.autocast else [])),
    }
    for worker in workers.values():
        worker.step()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(args.steps):
        for name, worker in workers.items():
            rows[name].append(worker.step())
    for worker in workers.values():
        worker.close()
    report(args, rows)


def report(args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print the table and append the row."""
    tokens = args.batch * args.length
    tools = {}
    for name, steps in rows.items():
        seconds = [s["seconds"] for s in steps]
        tools[name] = {
            "median_s": round(statistics.median(seconds), 3),
            "min_s": round(min(seconds), 3),
            "max_s": round(max(seconds), 3),
            "tokens_per_s": round(tokens / statistics.median(seconds), 1),
            "peak_rss_mb": steps[-1]["peak_rss_mb"],
            "losses": [round(s["loss"], 4) for s in steps],
        }
        print(f"{name:8} {tools[name]}")
    ratios = sorted(b["seconds"] / a["seconds"] for a, b in zip(rows["deltaw"], rows["peft"], strict=True))
    ratio = round(statistics.median(ratios), 3)
    print(f"deltaw's step is {ratio}x as fast as PEFT's ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    row = {
        "bench": "train_step",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "machine": machine() | {"cpu": platform.processor() or None},
        "versions": versions() | {"peft": version("peft")},
        "sizes": {"batch": args.batch, "length": args.length, "rank": 16, "dtype": args.dtype, "seed": 0},
        "peft_autocast": args.autocast,
        "tools": tools,
        "ratio": ratio,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
