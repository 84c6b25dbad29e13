"""How much memory does quantising a base while it loads need, at its peak?

The bound it must keep: the quantised model (codes, constants, what stays dense) plus two of its largest tensors in
float32, on top of what a process needs that has loaded a tiny model. The naive answer: the whole dense model first.

    .venv/bin/python bench/bench_load.py --base FOLDER [--format nf4] [--double-quant] [--dtype bfloat16]

FOLDER may come from bench/synthetic_llama.py. Anonymous memory (RssAnon: what cannot be dropped and read again) is
sampled every millisecond in a fresh process. Prints the figures; appends one JSON row to bench/results/load.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell RssAnon")


class Peak:
    """The largest RssAnon while it runs."""

    def __init__(self) -> None:
        self.bytes = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.bytes = max(self.bytes, anonymous_bytes())

    def stop(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.bytes


def warm() -> None:
    """Load a tiny model in the same way, so that imports and thread pools are paid before the baseline."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from deltaw.model.base import load_base
    from deltaw.model.load import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = load_tokenizer("smollm2-135m-instruct")
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
        load_base(folder, "nf4", dtype="bfloat16")


def child(args: argparse.Namespace) -> dict[str, Any]:
    """Load the base in this process and say what it needed."""
    warm()
    from deltaw.model.base import load_base
    from deltaw.model.quantised import frozen_weights

    before, peak, began = anonymous_bytes(), Peak(), time.perf_counter()
    model = load_base(args.base, args.format, args.dtype, block=args.block, double_quant=args.double_quant)
    seconds, top, after = time.perf_counter() - began, peak.stop(), anonymous_bytes()
    frozen = frozen_weights(model.net).values()
    quantised = sum(w.nbytes() for w in frozen)
    dense = sum(p.numel() * p.element_size() for p in model.net.parameters())
    sizes = [w.in_features * w.out_features for w in frozen] + [p.numel() for p in model.net.parameters()]
    bound = quantised + dense + 2 * 4 * max(sizes)
    return {
        "parameters": sum(w.in_features * w.out_features for w in frozen)
        + sum(p.numel() for p in model.net.parameters()),
        "seconds": seconds,
        "baseline_bytes": before,
        "quantised_bytes": quantised,
        "dense_bytes": dense,
        "largest_float32_bytes": 4 * max(sizes),
        "bound_bytes": bound,
        "after_bytes": after - before,
        "peak_bytes": top - before,
        "peak_over_bound": (top - before) / bound,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--format", default="nf4")
    p.add_argument("--block", type=int, default=64)
    p.add_argument("--double-quant", action="store_true")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(child(args)))
        return
    from deltaw.train.checkpoint import machine, versions

    done = subprocess.run([sys.executable, *sys.argv, "--child"], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    settings = {k: getattr(args, k) for k in ("format", "block", "double_quant", "dtype")}
    row = {
        "bench": "load",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        **found,
    }
    with (ROOT / "bench" / "results" / "load.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    for key, value in found.items():
        print(f"{key:24}{value / 1e6:12,.1f} MB" if key.endswith("bytes") else f"{key:24}{value:12,.3f}")


if __name__ == "__main__":
    main()
