"""One training step of deltaw at a time, as a worker that a bench drives over stdin (workers.py).

The same step as peers/peft_step.py: LoRA on all seven linears, `batch` rows of `length` random tokens, the second
half of each row targets, clipping at 1.0, AdamW. With `--format nf4` the base is quantised as it loads, with double
quantisation.
"""

from __future__ import annotations

import argparse

import torch

import deltaw
from deltaw.data.template import Example
from deltaw.ops import pool
from deltaw.train.loss import sft
from deltaw.train.optimizer import make_optimizer
from deltaw.train.recipe import TrainSpec
from deltaw.train.step import step_gradient
from workers import serve

N_SPECIAL = 17  # SmolLM2's vocabulary starts with its special tokens; they are not text


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--format", choices=["dense", "nf4"], default="dense")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--alpha", type=int, default=32)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


def make_examples(vocab_size: int, batch: int, length: int, seed: int) -> list[Example]:
    """The rows of peft_step.make_batch as documents."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(N_SPECIAL, vocab_size, (batch, length), generator=generator)
    is_target = tuple(i >= length // 2 for i in range(length))
    return [Example(tuple(row), is_target, f"row {i}") for i, row in enumerate(ids.tolist())]


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    pool.start()  # as deltaw.train does
    model = deltaw.load_base(args.base, args.format, args.dtype, double_quant=args.format != "dense")
    model.attach(deltaw.Lora(rank=args.rank, alpha=args.alpha), seed=args.seed)
    parameters = model.trainable()
    optimizer = make_optimizer(parameters, TrainSpec(lr=args.lr))
    examples = make_examples(model.net.config.vocab_size, args.batch, args.length, args.seed)

    def step() -> float:
        loss, _, _ = step_gradient(model, examples, sft)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    serve(step)


if __name__ == "__main__":
    main()
