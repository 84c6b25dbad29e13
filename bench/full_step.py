"""One full fine-tuning step at a time, as a worker that bench_paged.py drives over stdin.

`tokens` random tokens in rows of `length`, the second half of each row targets, clipping at 1.0, AdamW with the
settings given. A first step of a few tokens makes the states before it is ready (workers.py). Memory is this process's
resident anonymous bytes, in MB (10^6 bytes).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import deltaw
from deltaw.methods import Full
from deltaw.train.loss import sft
from deltaw.train.optimizer import make_optimizer
from deltaw.train.recipe import TrainSpec
from deltaw.train.step import step_gradient
from ours_step import make_examples
from workers import serve, status_mb


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--tokens", type=int, default=8192)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--micro", type=int, default=2048)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--folder", type=Path, required=True)
    p.add_argument("--optimizer", type=json.loads, default={})
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = deltaw.load_base(args.base, dtype="float32")
    model.attach(Full(), seed=0)
    parameters = model.trainable()
    before = status_mb("RssAnon")
    optimizer = make_optimizer(parameters, TrainSpec(lr=1e-5, optimizer=args.optimizer), args.folder)
    examples = make_examples(model.net.config.vocab_size, args.tokens // args.length, args.length, seed=0)

    def step(n: int) -> dict[str, object]:
        start = time.perf_counter()
        loss, _, _ = step_gradient(model, examples[:n], sft, micro_tokens=args.micro)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        update = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        during = status_mb("RssAnon")  # gradients and states
        optimizer.zero_grad()
        return {
            "seconds": time.perf_counter() - start,
            "update_s": end - update,
            "loss": loss,
            "moved_mb": None if optimizer.moved_bytes is None else optimizer.moved_bytes / 1e6,
            "anon_mb": during,
            "anon_before_mb": before,
            "held_mb": optimizer.resident_bytes / 1e6,
        }

    step(1)
    serve(lambda: step(len(examples)))


if __name__ == "__main__":
    main()
