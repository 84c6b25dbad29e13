"""Where does the speed of our training step come from? The same step with parts switched on one after the other.

The naive answer it must beat: from the compiled kernels alone. What would change our mind: a row whose gain is within
the range of the row before it.

    .venv/bin/python bench/bench_gains.py [--steps 5] [--batch 8] [--length 256]

One process, one model, one batch; the variants step in turn. Each row has everything of the rows above it. Prints a
table and appends a row to bench/results/gains.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import deltaw
from deltaw.model.model import Model
from deltaw.ops import arena, thin
from deltaw.ops.native import elementwise_calls, library, wide_calls
from deltaw.train.loss import sft
from deltaw.train.optimizer import make_optimizer
from deltaw.train.recipe import TrainSpec
from deltaw.train.step import step_gradient
from ours_step import make_examples
from workers import append, identity

HERE = Path(__file__).resolve().parent


@contextmanager
def plain(model: Model) -> Iterator[None]:
    """The model's own code, where adapters sit in hosts: a hook that does nothing is enough."""
    hook = model.net.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def no_region(model: Model) -> Iterator[None]:
    """Every buffer from PyTorch's allocator."""
    own = model.arena
    with mock.patch.object(arena, "_physical_bytes", return_value=0):
        model.arena = arena.Arena()
        try:
            yield
        finally:
            model.arena = own


def variants(model: Model) -> dict[str, list[Callable[[], Any]]]:
    """What is switched off in each row."""
    own = partial(plain, model)
    reference = partial(library.forced, "reference")
    no_elementwise = partial(mock.patch.object, elementwise_calls, "suits", return_value=False)
    no_thin = partial(mock.patch.object, thin, "THIN", 0)
    no_wide = partial(mock.patch.object, wide_calls, "available", lambda: False)
    apart = partial(no_region, model)
    return {
        "the model's own blocks, torch alone": [own, reference],
        "compiled attention and cross-entropy": [own],
        "fused blocks, loss from hidden states of targets": [apart, no_elementwise, no_thin, no_wide],
        "memory that stays (arena)": [no_elementwise, no_thin, no_wide],
        "compiled norms, rotation, gate": [no_thin, no_wide],
        "compiled thin products": [no_wide],
        "products with frozen matrices as one sum each": [],
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=HERE / "results" / "gains.jsonl")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = deltaw.load_base(args.base, dtype=args.dtype)
    model.attach(deltaw.Lora(rank=16, alpha=32))
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, TrainSpec(lr=5e-4))
    examples = make_examples(model.net.config.vocab_size, args.batch, args.length, 0)
    seconds: dict[str, list[float]] = {}
    for turn in range(args.steps + 1):
        for name, off in variants(model).items():
            with ExitStack() as stack:
                for switch in off:
                    stack.enter_context(switch())
                began = time.perf_counter()
                step_gradient(model, examples, sft)
                torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if turn:
                    seconds.setdefault(name, []).append(time.perf_counter() - began)
    first = None
    print("| with | seconds a step | range | times the first row |\n|---|---|---|---|")
    for name, found in seconds.items():
        median = statistics.median(found)
        first = median if first is None else first
        print(f"| {name} | {median:.2f} | {min(found):.2f} to {max(found):.2f} | {first / median:.2f} |")
    sizes = {"base": args.base, "batch": args.batch, "length": args.length, "dtype": args.dtype}
    append(args.out, identity("gains") | {"sizes": sizes, "seconds": seconds})


if __name__ == "__main__":
    main()
