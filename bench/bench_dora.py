"""What does DoRA's training step cost beside LoRA's, and what does it cost in HF PEFT?

The answer it must beat: 1.25 times LoRA's step (peers: 1.26 to 2.4 times). What would change our mind: a ratio that
moves by over 5 % between calls.

    .venv/bin/python bench/bench_dora.py [--steps 7] [--tools deltaw,peft]

The step is bench_train.py's. LoRA and DoRA of one tool are workers of this process and step in turn, so that a shared
machine does not bend the ratio; the tools follow one another, so that four models need not fit in memory. The first two
steps of each are not counted. Prints a table; appends one JSON row to bench/results/dora.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from ours_step import make_examples
from peers.peft_step import LINEARS, make_batch
from workers import Worker, serve

HERE = Path(__file__).resolve().parent
RANK, ALPHA, LR = 16, 32, 5e-4


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--steps", type=int, default=7)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tools", default="deltaw,peft")
    p.add_argument("--worker", help="used by this script itself: deltaw/lora, peft/dora ...")
    p.add_argument("--out", type=Path, default=HERE / "results" / "dora.jsonl")
    return p.parse_args()


# One worker ------------------------------------------------------------------------------------------------------


def deltaw_step(args: argparse.Namespace, method: str) -> Callable[[], float]:
    """A step of ours_step.py with another method."""
    import deltaw
    from deltaw.methods import spec_from
    from deltaw.train.loss import sft
    from deltaw.train.optimizer import make_optimizer
    from deltaw.train.recipe import TrainSpec
    from deltaw.train.step import step_gradient

    model = deltaw.load_base(args.base, dtype=args.dtype)
    model.attach(spec_from({"method": method, "rank": RANK, "alpha": ALPHA}), seed=0)
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, TrainSpec(lr=LR))
    examples = make_examples(model.net.config.vocab_size, args.batch, args.length, 0)

    def step() -> float:
        loss, _, _ = step_gradient(model, examples, sft)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def peft_step(args: argparse.Namespace, method: str) -> Callable[[], float]:
    """A step of peers/peft_step.py, with or without use_dora."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=getattr(torch, args.dtype), attn_implementation="sdpa")
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, use_dora=method == "dora", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR)
    ids, labels = make_batch(base.config.vocab_size, args.batch, args.length, 0)

    def step() -> float:
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def work(args: argparse.Namespace) -> None:
    """Serve steps."""
    torch.set_num_threads(args.threads)
    tool, _, method = args.worker.partition("/")
    step = (deltaw_step if tool == "deltaw" else peft_step)(args, method)
    serve(step)


# The comparison --------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, tool: str) -> dict[str, Any]:
    """The steps of both methods of one tool."""
    shared = ["--base", args.base, "--batch", str(args.batch), "--length", str(args.length)]
    shared += ["--dtype", args.dtype, "--threads", str(args.threads)]
    workers = {m: Worker(Path(__file__).name, [*shared, "--worker", f"{tool}/{m}"]) for m in ("lora", "dora")}
    for worker in (*workers.values(), *workers.values()):
        worker.step()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for _ in range(args.steps):
        for name, worker in workers.items():
            rows[name].append(worker.step())
    for worker in workers.values():
        worker.close()
    found: dict[str, Any] = {}
    for name, steps in rows.items():
        seconds = [s["seconds"] for s in steps]
        found[name] = {
            "median_s": round(statistics.median(seconds), 3),
            "min_s": round(min(seconds), 3),
            "max_s": round(max(seconds), 3),
            "cpu_s": round(statistics.median(s["cpu_s"] for s in steps), 3),
            "peak_rss_mb": steps[-1]["peak_rss_mb"],
            "losses": [round(s["loss"], 4) for s in steps],
        }
        print(f"{tool:7} {name}  {found[name]}")
    ratios = sorted(d["seconds"] / p["seconds"] for p, d in zip(rows["lora"], rows["dora"], strict=True))
    found |= {"ratio": round(statistics.median(ratios), 3), "ratios": [round(r, 3) for r in ratios]}
    found["cpu_ratio"] = round(found["dora"]["cpu_s"] / found["lora"]["cpu_s"], 3)
    spread = f"{ratios[0]:.3f} to {ratios[-1]:.3f}; processor time {found['cpu_ratio']}"
    print(f"{tool}: DoRA's step takes {found['ratio']} times LoRA's ({spread})", flush=True)
    return found


def main() -> None:
    args = parse()
    if args.worker:
        work(args)
        return
    from deltaw.model.load import resolve_base
    from deltaw.train.checkpoint import machine, versions

    args.base = str(resolve_base(args.base))
    load = os.getloadavg()[0]
    tools = {tool: measure(args, tool) for tool in args.tools.split(",")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    row = {
        "bench": "dora",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "machine": machine() | {"cpu": platform.processor() or None, "threads": args.threads, "load_before": load},
        "versions": versions() | {"peft": version("peft")},
        "sizes": {"batch": args.batch, "length": args.length, "rank": RANK, "dtype": args.dtype, "seed": 0},
        "tools": tools,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
