"""What does GaLore save of the optimizer's states, and what does it cost?

The naive answer it must beat: AdamW, whose states are 8 bytes a parameter (2.03 in 8 bits). What would change our mind:
real bytes other than the planned ones; an update that costs more than a tenth of a step (bench_paged.py: 40 s).

    .venv/bin/python bench/bench_galore.py [--rank 128] [--updates 3] [--tokens 512]

Full fine-tuning of the base in float32. For each setting a process of its own: gradients of one real step, then that
update again and again; the first one of GaLore projects anew, the others do not. And, in one process, a refresh of each
shape of matrix by its parts beside torch.linalg.svd of the same gradient. Prints a table; appends one JSON row to
bench/results/galore.jsonl. Memory is in MB (10^6 bytes); `anon_mb` is what making the optimizer and its first update
added to this process's resident anonymous memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import deltaw
from deltaw.methods import Full
from deltaw.model.load import resolve_base
from deltaw.model.model import Model
from deltaw.plan.memory import release_free_memory
from deltaw.train.checkpoint import machine, versions
from deltaw.train.loss import sft
from deltaw.train.optim.galore import leading_vectors
from deltaw.train.optimizer import make_optimizer
from deltaw.train.planning import optimizer_bytes
from deltaw.train.recipe import TrainSpec
from deltaw.train.step import step_gradient
from ours_step import make_examples
from workers import HERE, status_mb


def settings(rank: int) -> dict[str, dict[str, Any]]:
    """What is compared, as recipes write it."""
    galore = {"name": "galore", "rank": rank}
    return {
        "adamw": {},
        "adamw, 8 bits": {"bits": 8},
        "galore": galore,
        "galore, 8 bits": {**galore, "bits": 8},
        "galore, paged": {**galore, "paged": True},
        "galore, 8 bits, paged": {**galore, "bits": 8, "paged": True},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--rank", type=int, default=128)
    p.add_argument("--updates", type=int, default=3)
    p.add_argument("--tokens", type=int, default=512)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--folder", type=Path, default=HERE)
    p.add_argument("--out", type=Path, default=HERE / "results" / "galore.jsonl")
    p.add_argument("--part", help="one setting, or 'refresh'; used by this program itself")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps(refreshes(args) if args.part == "refresh" else measured(args)))
        return
    found = {name: in_a_process(name) for name in settings(args.rank)}
    for name, row in found.items():
        print(f"{name:22}", row, flush=True)
        assert row["planned_bytes"] == row["real_bytes"], name
    shapes = in_a_process("refresh")
    print(shapes)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    sizes = {k: getattr(args, k) for k in ("base", "rank", "updates", "tokens", "threads")} | {"seed": 0}
    row = {
        "bench": "galore",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit.stdout.strip() or None,
        "machine": machine() | {"cpu": platform.processor() or None, "load": os.getloadavg()[0]},
        "versions": versions(),
        "sizes": sizes,
        "settings": found,
        "refresh": shapes,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


def in_a_process(part: str) -> dict[str, Any]:
    """What this program finds for one part, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--part", part]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def with_gradients(args: argparse.Namespace) -> Model:
    """The base with the clipped gradients of one step."""
    model = deltaw.load_base(str(resolve_base(args.base)), dtype="float32")
    model.attach(Full(), seed=0)
    step_gradient(model, make_examples(model.net.config.vocab_size, args.tokens // 256, 256, seed=0), sft)
    torch.nn.utils.clip_grad_norm_(list(model.trainable().values()), 1.0)
    release_free_memory()
    return model


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes and seconds of one setting."""
    model = with_gradients(args)
    parameters, sites = model.trainable(), model.places.sites.values()
    spec = TrainSpec(lr=1e-5, optimizer=settings(args.rank)[args.part])
    before = status_mb("RssAnon")
    optimizer = make_optimizer(parameters, spec, args.folder, sites)
    seconds = []
    for number in range(1 + args.updates):
        start = time.perf_counter()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        if number == 0:
            release_free_memory()
            after = status_mb("RssAnon")
    update = statistics.median(seconds[1:])
    return {
        "planned_bytes": optimizer_bytes(parameters, spec, sites),
        "real_bytes": optimizer.resident_bytes,
        "anon_mb": None if before is None or after is None else round(after - before, 1),
        "update_s": round(update, 3),
        "update_min_s": round(min(seconds[1:]), 3),
        "update_max_s": round(max(seconds[1:]), 3),
        "first_s": round(seconds[0], 3),
        "moved_mb": None if optimizer.moved_bytes is None else round(optimizer.moved_bytes / 1e6, 1),
    }


def refreshes(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of new projections by shape, on one core, ours and by torch.linalg.svd; and how far they differ."""
    model = with_gradients(args)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, site in model.places.sites.items():
        G = model.trainable()[f"{name}.weight"].grad if f"{name}.weight" in model.trainable() else None
        if site.kind == "embedding" or site.is_head or G is None or str(tuple(G.shape)) in found:
            continue
        tall = G.shape[0] >= G.shape[1]

        def svd(G: torch.Tensor = G, tall: bool = tall) -> torch.Tensor:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            return Vh[: args.rank].T if tall else U[:, : args.rank]

        U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        exact = Vh[: args.rank].T if tall else U[:, : args.rank]
        row: dict[str, Any] = {"singular_value_ratio": float(S[args.rank - 1] / S[0])}
        for key, how in (("ours", lambda G=G: leading_vectors(G, args.rank)), ("svd", svd)):
            vectors = how()
            times = []
            for _ in range(3):
                start = time.perf_counter()
                how()
                times.append(1000 * (time.perf_counter() - start))
            far = (vectors.double() @ vectors.double().T - exact @ exact.T).norm() / args.rank**0.5
            row |= {f"{key}_ms": round(statistics.median(times), 2), f"{key}_error": float(far)}
        found[str(tuple(G.shape))] = row
    return found


if __name__ == "__main__":
    main()
