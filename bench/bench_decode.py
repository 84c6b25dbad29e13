"""How near is a step of the fast runner to what memory and arithmetic allow, and to transformers' generate?

The naive answer it must beat: transformers' generate, whose Python and small calls cost more than reading the weights.
What would change our mind: a step of one row that takes more than twice the time of reading the weights once.

    .venv/bin/python bench/bench_decode.py [--threads 2] [--repeats 15]

The starter in bfloat16. Of each turn: a step of the fast runner for 1, 16 and 48 sequences behind 96 tokens, the same
with 8 LoRA adapters of rank 16 on all linear maps, a prompt of 512 tokens, one read of as many bytes as the weights
have, and 4 tokens of transformers' generate for one sequence. Turns are interleaved; the least and the median of each
are kept, since other work on the machine only ever adds. Prints a table and appends a row to
bench/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

import deltaw
from deltaw.model.model import Model
from deltaw.model.paged import cache_shapes
from deltaw.model.resident import settle
from deltaw.ops.native.calls import read_sum
from deltaw.serve.batch import Segment, StepBatch
from deltaw.serve.fast import FastRunner
from deltaw.serve.pages import Pages
from workers import append, identity

CONTEXT, ADAPTERS, NEW = 96, 8, 4
RESULTS = Path(__file__).parent / "results" / "decode.jsonl"


def decoding(n: int, keys: list[str | None]) -> StepBatch:
    """One new token of n sequences behind CONTEXT tokens, shared out among `keys` in runs."""
    pages = CONTEXT // 16 + 1
    tables = torch.arange(n * pages, dtype=torch.int32).view(n, pages)
    slots = tables.long()[:, CONTEXT // 16] * 16 + CONTEXT % 16
    at, each = torch.full((n,), CONTEXT), n // len(keys)
    segments = tuple(Segment(i * each, (i + 1) * each, key) for i, key in enumerate(keys))
    rows = torch.arange(n)
    return StepBatch(rows * 7 + 5, at, slots, torch.arange(n + 1), at, tables, segments, rows, segments)


def prompt(n: int) -> StepBatch:
    """A prompt of n tokens, whose last row's logits are wanted."""
    at, tables = torch.arange(n), torch.arange(-(-n // 16), dtype=torch.int32)[None]
    ends = torch.tensor([0, n])
    of_all, of_one = (Segment(0, n, None),), (Segment(0, 1, None),)
    return StepBatch(
        at * 7 % 999 + 5, at, at, ends, torch.zeros(1, dtype=torch.int64), tables, of_all, ends[1:] - 1, of_one
    )


def adapters(model: Model) -> list[deltaw.Adapter]:
    """Noise of rank 16 at every linear map."""
    made = []
    for seed in range(ADAPTERS):
        model.attach(deltaw.Lora(rank=16, alpha=32, targets="all-linear"), seed=seed)
        for t in model.trainable().values():
            t.data.normal_(std=0.02)
        made.append(model.adapter())
        model.detach()
    return made


def weights_read(model: Model) -> int:
    """Bytes of weights that a step of one row reads: all but the embedding, of which it looks one row up."""
    tied = model.net.get_output_embeddings().weight is model.net.get_input_embeddings().weight
    sizes = {n: p.numel() * p.element_size() for n, p in model.net.named_parameters()}
    return sum(sizes.values()) - (0 if tied else sizes["model.embed_tokens.weight"])


def measured(repeats: int) -> dict[str, object]:
    """Seconds of each, the least and the median."""
    model = deltaw.load_base("smollm2-135m-instruct", dtype="bfloat16")
    made = adapters(model)
    plain = deltaw.load_base("smollm2-135m-instruct", dtype="bfloat16").net
    pages = Pages(cache_shapes(model.net), 1 << 28, torch.bfloat16, model.device)
    runner = FastRunner(model, pages)
    names = [f"a{i}" for i in range(ADAPTERS)]
    for name, adapter in zip(names, made, strict=True):
        resident = settle(model, adapter)
        runner.add(name, resident, runner.ready(resident))
    n_bytes = weights_read(model)
    memory, ids = torch.ones(n_bytes // 4), torch.arange(5, 5 + CONTEXT)[None]
    works: dict[str, Callable[[], object]] = {"read": lambda: read_sum(memory)}
    for n in (1, 16, 48):
        works[f"{n} rows"] = lambda b=decoding(n, [None]): runner.run(b)
        keys = names if n > 1 else names[:1]
        works[f"{n} rows, {len(keys)} LoRA"] = lambda b=decoding(n, list(keys)): runner.run(b)
    works["prompt of 512"] = lambda b=prompt(512): runner.run(b)
    more = {"do_sample": False, "pad_token_id": 2, "attention_mask": torch.ones_like(ids)}
    works["generate 1"] = lambda: plain.generate(ids, min_new_tokens=1, max_new_tokens=1, **more)
    works["generate more"] = lambda: plain.generate(ids, min_new_tokens=1 + NEW, max_new_tokens=1 + NEW, **more)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {"weight_bytes": n_bytes} | {name: [min(s), median(s)] for name, s in seconds.items()}


def main() -> None:
    """Measure, print and note."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        found = measured(args.repeats)
    size = found.pop("weight_bytes")
    first, later = found.pop("generate 1"), found.pop("generate more")
    found["generate, a token"] = [(b - a) / NEW for a, b in zip(first, later, strict=True)]
    for name, (least, middle) in found.items():
        n = 512 if name.startswith("prompt") else int(name.split()[0]) if name[0].isdigit() else 1
        print(f"{name:24} least {least * 1e3:8.2f} ms, median {middle * 1e3:8.2f}: {n / least:8.0f} tokens/s")
    bound = found["read"][0] / found["1 rows"][0]
    print(f"reading at {size / found['read'][0] / 1e9:.1f} GB/s is {bound:.0%} of a step of one row")
    append(RESULTS, {**identity("decode"), "threads": args.threads, "weight_bytes": size, "seconds": found})


if __name__ == "__main__":
    main()
