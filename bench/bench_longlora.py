"""Does LongLoRA let a base read documents beyond its length, and what do rescaled positions cost before training?

The naive answers it must beat: the base as it is beyond its length; positions rescaled and nothing trained; plain LoRA
on the same documents. What would change our mind: one of these as good behind a long context as LongLoRA.

    .venv/bin/python bench/bench_longlora.py [--variants base linear lora longlora] [--steps 8] [--length 4096]

The starter reads 8,192 tokens. The perplexity of the same 2,048 tokens is taken behind contexts of several lengths, the
longest beyond that. Trained variants see documents of `--length` tokens, rows of data/ppl/austen.jsonl and wiki.jsonl
in turn, one a step; what is judged is made of calibration.jsonl, which has other rows of the same two sources. Prints
perplexities; appends a JSON row a variant to bench/results/longlora.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from workers import append, identity

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data" / "ppl"
RESULTS = ROOT / "bench" / "results" / "longlora.jsonl"
BASE = "smollm2-135m-instruct"
JUDGED, CONTEXTS = 2048, [2048, 6144, 10_240]
POSITIONS = 16_384
VARIANTS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "linear": {"method": "longlora", "rank": 16, "alpha": 32, "max_positions": POSITIONS},  # as it starts
    "yarn": {"method": "longlora", "rank": 16, "alpha": 32, "max_positions": POSITIONS, "rope": "yarn"},
    "lora": {"method": "lora", "rank": 16, "alpha": 32},
    "longlora": {"method": "longlora", "rank": 16, "alpha": 32, "max_positions": POSITIONS},
    "longlora, yarn": {"method": "longlora", "rank": 16, "alpha": 32, "max_positions": POSITIONS, "rope": "yarn"},
}
TRAINED = ("lora", "longlora", "longlora, yarn")


def texts(*names: str) -> list[str]:
    """The rows of these files, one file after the other."""
    lines = [line for name in names for line in (DATA / name).read_text(encoding="utf-8").splitlines()]
    return [json.loads(line)["completion"] for line in lines]


def documents(n: int, seed: int) -> list[dict[str, str]]:
    """Training documents, each of all rows in another order: longer than `length` tokens, and cut to it."""
    rows, rng = texts("austen.jsonl", "wiki.jsonl"), random.Random(seed)
    return [{"text": "\n\n".join(rng.sample(rows, len(rows)))} for _ in range(n)]


def trained(adapter: dict[str, Any], args: argparse.Namespace, folder: Path) -> Any:
    """The last event of a run over `steps` documents."""
    import deltaw

    recipe = {
        "base": {"path": BASE, "dtype": "auto"},
        "adapter": adapter,
        "data": {"max_tokens": args.length},
        "train": {"steps": args.steps, "tokens_per_step": args.length, "lr": args.lr, "save_every_s": 1e6},
        "eval": {"keep": "last"},
    }
    *_, done = deltaw.train(recipe, folder / "run", train_rows=documents(args.steps, args.seed))
    return done


def one(label: str, args: argparse.Namespace) -> dict[str, Any]:
    """A variant's perplexity of the judged tokens behind each context, and what its training took."""
    import deltaw
    from deltaw.data.template import Example
    from deltaw.methods import spec_from
    from deltaw.train.evaluate import log_likelihoods

    adapter, row = VARIANTS[label], {"variant": label, "settings": VARIANTS[label], "judged": JUDGED}
    with tempfile.TemporaryDirectory() as folder:
        model = deltaw.load_base(BASE, dtype="auto")
        if label in TRAINED and adapter is not None:
            done = trained(adapter, args, Path(folder))
            row |= {"length": args.length, "steps": args.steps, "lr": args.lr, "seed": args.seed}
            row |= {"train_seconds": done.seconds, "tokens": done.tokens, "peak_rss_mb": done.peak_rss_mb}
            model.attach(done.adapter)
        elif adapter is not None:
            model.attach(spec_from(adapter))
    ids = model.tokenizer("\n\n".join(texts("calibration.jsonl")), verbose=False)["input_ids"]
    end = CONTEXTS[-1] + JUDGED
    for before in args.contexts:
        part = tuple(ids[end - JUDGED - before : end])
        judged = Example(part, tuple(i >= before for i in range(len(part))), f"{before} tokens before")
        began = time.perf_counter()
        row[f"behind {before}"] = math.exp(-log_likelihoods(model, [judged])[0] / JUDGED)
        row[f"seconds {before}"] = time.perf_counter() - began
    return row


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--length", type=int, default=4096, help="tokens of a training document")
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--contexts", type=int, nargs="+", choices=CONTEXTS, default=CONTEXTS)
    args = p.parse_args()
    for label in args.variants:
        row = identity("longlora") | one(label, args)
        append(RESULTS, row)
        told = "  ".join(f"behind {n:,}: {row[f'behind {n}']:.2f}" for n in args.contexts)
        print(f"{label:16} {told}", flush=True)


if __name__ == "__main__":
    main()
