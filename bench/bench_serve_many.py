"""Does a server keep its speed with thousands of registered adapters and memory for a few of them?

What would change our mind (issue 7): over 2,000 adapters less than 85 % of the tokens a second over 8, or one request
that fails.

    .venv/bin/python bench/bench_serve_many.py [--adapters 2000] [--room 50] [--rounds 3]

LoRA of rank 4 on q and v of the starter in a registry; a `deltaw serve` in bfloat16 with --host-mb and --adapters-mb
for `room` of them; the load test beside it (the client takes its part of the cores in every case).
In turn: 8 adapters, uniform; all, skewed (Zipf: the k-th most frequent with weight 1 / k), each round with other
ones in front and other prompts, so that what a round needs is mostly on disk. 48 requests are always open, 64 tokens
in, 64 out. Prints the ratios of paired rounds; appends a row to bench/results/serve_many.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import httpx

import deltaw
from deltaw.model.base import load_base
from deltaw.serve.load_test import Load, run_load
from deltaw.serve.process import own_server
from deltaw.store.peft import read_adapter
from deltaw.store.registry import Registry
from workers import HERE, append, identity, spread

FEW = 8
LOADS = 'deltaw_adapter_loads_total{result="done",tier="%s"}'


def fill(base: str, root: Path, n: int) -> None:
    """n adapters with noise in a registry."""
    model, registry = load_base(base, dtype="bfloat16"), Registry(root, create=True)
    model.attach(deltaw.Lora(rank=4, alpha=8, targets=["q_proj", "v_proj"]))
    for i in range(n):
        for value in model.trainable().values():
            value.data.normal_(std=0.02)
        registry.add(f"a{i:04}", model.adapter())
        if i % 250 == 249:
            print(f"{i + 1} adapters", flush=True)


def adapter_bytes(root: Path) -> int:
    """What residency counts for one of them."""
    adapter = read_adapter(Registry(root).folder("a0000"))
    return sum(t.numel() * t.element_size() for t in adapter.tensors().values())


def loads(url: str) -> dict[str, float]:
    """Adapters read from disk and put into the engine since the server began."""
    lines = dict(line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics").text.splitlines() if line[0] != "#")
    return {tier: float(lines.get(LOADS % tier, 0)) for tier in ("host", "active")}


def measured(url: str, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The load test's figures by case, round by round; the first round is not kept."""
    names = [f"a{i:04}" for i in range(args.adapters)]
    cases = {"few": ("uniform", tuple(names[:FEW])), "many": ("skewed", tuple(names))}
    found: dict[str, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(args.rounds + 1):
        for case, (traffic, adapters) in cases.items():
            n = args.requests if number else args.requests // 4
            load = Load(traffic, adapters, n, concurrency=48, seed=10 * number + len(case))
            before = loads(url)
            row = asyncio.run(run_load(url, load))
            row["loads"] = {tier: n - before[tier] for tier, n in loads(url).items()}
            print(number, case, {k: row[k] for k in ("output_tokens_per_s", "models", "loads", "errors")}, flush=True)
            if number:
                found[case].append(row)
    return found


def main() -> None:
    """Fill, serve, load in turn, print and append."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--adapters", type=int, default=2000)
    p.add_argument("--room", type=int, default=50)
    p.add_argument("--requests", type=int, default=192)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--registry", type=Path, help="kept here and used again, where it is full")
    args = p.parse_args()
    about = identity("serve_many")
    with tempfile.TemporaryDirectory() as folder:
        root = args.registry or Path(folder) / "registry"
        if not (root / "registry.json").is_file():
            fill(args.base, root, args.adapters)
        room = str(-(-args.room * adapter_bytes(root) // 2**20))
        own = ["--base", args.base, "--dtype", "bfloat16", "--registry", str(root)]
        with own_server([*own, "--host-mb", room, "--adapters-mb", room]) as server:
            found = measured(server.url, args)
    paired = zip(found["many"], found["few"], strict=True)
    ratio = spread([a["output_tokens_per_s"] / b["output_tokens_per_s"] for a, b in paired], 3)
    errors = {case: [row["errors"] for row in rows if row["errors"]] for case, rows in found.items()}
    told = {case: spread([row["output_tokens_per_s"] for row in rows], 1) for case, rows in found.items()}
    print(f"{told}; many / few {ratio}; errors {errors}")
    keys = ("output_tokens_per_s", "models", "loads", "ttft_ms", "inter_token_ms", "latency_ms", "seconds")
    kept = {case: [{key: row[key] for key in keys} for row in rows] for case, rows in found.items()}
    sizes = {"adapters": args.adapters, "room": args.room, "mb": int(room), "requests": args.requests}
    row = {**about, **sizes, "tokens_per_s": told, "ratio": ratio, "errors": errors, "rounds": kept}
    append(HERE / "results" / "serve_many.jsonl", row)
    raise SystemExit(1 if any(errors.values()) else 0)


if __name__ == "__main__":
    main()
