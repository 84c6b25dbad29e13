"""What does an adapter cost at inference? The LoRA paper's latency table (arXiv:2106.09685, table 1), on this CPU.

The naive answer it must beat: none, once merged. What would change our mind: a merged LoRA outside the
base's own spread.

    .venv/bin/python bench/bench_latency.py [--rounds 15] [--threads 2] [--sizes 8x512]

One forward of the starter in bfloat16 at several batches and lengths: the base, LoRA merged into it, LoRA attached,
Houlsby and Pfeiffer adapters, a prefix. All stand ready in one process and are called in turn. Prints milliseconds and
per cent over the base, medians; appends a JSON row to bench/results/latency.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import deltaw
from deltaw.train.checkpoint import machine, versions

ROOT = Path(__file__).resolve().parent.parent
BASE = "smollm2-135m-instruct"
SIZES = [(1, 128), (4, 256), (8, 512)]  # rows, tokens; the paper: (1, 128), (16, 256), (32, 512) on a GPU
KINDS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "lora, merged": None,
    "lora, attached": {"method": "lora", "rank": 16, "alpha": 32},
    "houlsby": {"method": "houlsby", "bottleneck": 64},
    "pfeiffer": {"method": "houlsby", "bottleneck": 64, "placement": "pfeiffer"},
    "prefix": {"method": "prefix", "n_tokens": 20},
}


def made() -> dict[str, Any]:
    """The models, each with noise in its adapter."""
    from deltaw.methods import spec_from

    base = deltaw.load_base(BASE, dtype="bfloat16")
    rng = torch.Generator().manual_seed(0)

    def noisy(settings: dict[str, Any]) -> Any:
        model = deltaw.load_base(BASE, dtype="bfloat16")
        model.attach(spec_from(settings))
        with torch.no_grad():
            for value in model.trainable().values():
                value += 0.01 * torch.randn(value.shape, generator=rng)
        return model

    found = {name: noisy(settings) for name, settings in KINDS.items() if settings is not None}
    with tempfile.TemporaryDirectory() as folder:
        adapter = found["lora, attached"].adapter()
        deltaw.bake(BASE, adapter, Path(folder) / "merged", dtype="bfloat16", measure=False)
        found["lora, merged"] = deltaw.load_base(Path(folder) / "merged", dtype="bfloat16")
    return {"base": base} | found


def size(text: str) -> tuple[int, int]:
    """Rows and tokens of "8x512"."""
    rows, tokens = text.split("x")
    return int(rows), int(tokens)


@torch.no_grad()
def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--sizes", type=size, nargs="+", default=SIZES, help="rows x tokens")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    models = made()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    rows: dict[str, Any] = {}
    for n, length in args.sizes:
        ids = torch.randint(0, 40_000, (n, length), generator=torch.Generator().manual_seed(1))
        times: dict[str, list[float]] = {name: [] for name in KINDS}
        for round_ in range(args.rounds + 2):
            for name in KINDS:
                began = time.perf_counter()
                models[name].logits(ids)
                if round_ > 1:
                    times[name].append(1000 * (time.perf_counter() - began))
        base = statistics.median(times["base"])
        print(f"{n} x {length} tokens", flush=True)
        for name in KINDS:
            ms = statistics.median(times[name])
            spread = (statistics.quantiles(times[name], n=4)[2] - statistics.quantiles(times[name], n=4)[0]) / ms
            over = statistics.median(100 * (t / b - 1) for t, b in zip(times[name], times["base"], strict=True))
            rows[f"{n}x{length} {name}"] = {"ms": ms, "spread": spread, "over_base_percent": over}
            print(f"  {name:16} {ms:8.1f} ms  {over:+6.1f} %  (quartiles {100 * spread:.0f} % apart)")
        assert base > 0
    row = {
        "bench": "latency",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine() | {"cpu": platform.processor() or None},
        "versions": versions(),
        "rounds": args.rounds,
        "settings": KINDS,
        "rows": rows,
    }
    with open(ROOT / "bench" / "results" / "latency.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
