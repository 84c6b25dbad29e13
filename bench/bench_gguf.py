"""Does llama.cpp compute with our GGUF files what we compute?

The naive answer it must beat: converters that read lora_alpha and nothing else, which give rsLoRA a scale too small by
sqrt(rank) and a map with an alpha of its own another map's. What would change our mind about folding scales into B:
a slope off 1 by more than a hundredth, or a next token that differs in more than one place of a hundred.

    .venv/bin/pip install llama-cpp-python && .venv/bin/python bench/bench_gguf.py [--base smollm2-135m-instruct]

Each adapter is a spec attached with a seed and noise in every tensor, so that it moves logits by about 1. Base and
adapter are written as float32 GGUF, loaded by llama.cpp (float32 cache, no flash attention), and computed teacher-
forced over 20 texts, as ours are. Slope: of llama.cpp's change of logits (adapter minus base) regressed on ours. Prints
a table; appends one JSON row to bench/results/gguf.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.core.spec import MethodSpec
from deltaw.data.source import read_rows
from deltaw.model.load import load_tokenizer
from deltaw.model.model import Model
from deltaw.train.checkpoint import machine, versions

ROOT = Path(__file__).resolve().parent.parent
MOST_TOKENS = 24
SPECS: dict[str, MethodSpec] = {
    "lora": deltaw.Lora(rank=8, alpha=20),
    "rslora": deltaw.Lora(rank=8, alpha=7, rslora=True),
    "mixed alpha": deltaw.Lora(rank=8, alpha=20, alpha_pattern={"q_proj": 6, "down_proj": 36, "3.mlp.up_proj": 80}),
    "mixed rank": deltaw.Lora(rank=8, alpha=7, rslora=True, rank_pattern={"k_proj": 3, "gate_proj": 16}),
    "vera": deltaw.Vera(rank=64),
}
NOISE = {"lora": 0.025, "vera": 0.5}
"""Standard deviation, such that logits move by about 1."""

Logits = list[NDArray[np.float32]]


def texts(n: int = 20) -> list[str]:
    """Half of them questions, half of them pages."""
    wiki = [r.completion for r in read_rows(ROOT / "data/ppl/wiki.jsonl")]
    asked = [f"{r.prompt} {r.completion}" for r in read_rows(ROOT / "data/supersense/test.jsonl")]
    return [*wiki[: n // 2], *asked[: n - n // 2]]


def noisy(model: Model, spec: MethodSpec, seed: int = 0) -> Adapter:
    """A finished adapter with noise in every tensor; detached again."""
    model.attach(spec)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in next(iter(model.adapters.values())).parameters().values():
            tensor.add_(torch.randn(tensor.shape, generator=rng) * NOISE[spec.name])
    adapter = model.adapter()
    model.detach()
    return adapter


@torch.no_grad()
def our_logits(model: Model, rows: Sequence[Sequence[int]]) -> Logits:
    """[tokens, vocab] of each row, float32."""
    return [model.logits(torch.tensor([list(ids)]))[0].float().numpy() for ids in rows]


def llama_logits(base: Path, rows: Sequence[Sequence[int]], adapter: Path | None = None) -> Logits:
    """The same from llama.cpp."""
    from llama_cpp import Llama

    longest = max(map(len, rows))
    model = Llama(
        str(base), lora_path=None if adapter is None else str(adapter), n_ctx=longest, n_batch=longest,
        type_k=0, type_v=0, logits_all=True, flash_attn=False, n_threads=2, verbose=False,
    )  # fmt: skip
    found = []
    for ids in rows:
        model.reset()
        model.eval(list(ids))
        found.append(model.scores[: len(ids)].copy())
    model.close()
    return found


def llama_tokens(base: Path, given: Sequence[str]) -> list[list[int]]:
    """llama.cpp's tokens of each text."""
    from llama_cpp import Llama

    model = Llama(str(base), vocab_only=True, verbose=False)
    found = [model.tokenize(text.encode(), add_bos=True, special=True) for text in given]
    model.close()
    return found


def agreement(ours: Logits, theirs: Logits, our_base: Logits, their_base: Logits) -> dict[str, float]:
    """How near two models with an adapter are, and whether the adapter has the same size in both.

    top1   share of positions with the same likeliest next token;  apart  largest difference of a logit
    slope, correlation  of their change (adapter minus base) against ours;  moved  rms of our change
    """
    a, b = np.concatenate(ours), np.concatenate(theirs)
    x = (a - np.concatenate(our_base)).astype(np.float64).ravel()
    y = (b - np.concatenate(their_base)).astype(np.float64).ravel()
    xc, yc = x - x.mean(), y - y.mean()
    return {
        "top1": float((a.argmax(1) == b.argmax(1)).mean()),
        "slope": float(xc @ yc / (xc @ xc)),
        "correlation": float(xc @ yc / np.sqrt((xc @ xc) * (yc @ yc))),
        "moved": float(np.sqrt((x * x).mean())),
        "apart": float(np.abs(a - b).max()),
        "tokens": len(a),
    }


def compare(base: str, folder: Path, names: Sequence[str]) -> tuple[dict[str, dict[str, float]], int]:
    """The figures of each adapter of SPECS by name, "base" among them, and how many of the texts get other tokens."""
    model = deltaw.load_base(base)
    tokenizer = load_tokenizer(base)
    given = texts()
    deltaw.export_gguf(base, folder / "base.gguf", merged=True, dtype="float32")
    other = sum(
        a != list(b) for a, b in zip(llama_tokens(folder / "base.gguf", given), _ids(tokenizer, given), strict=True)
    )
    rows = [ids[:MOST_TOKENS] for ids in _ids(tokenizer, given)]
    our_base, their_base = our_logits(model, rows), llama_logits(folder / "base.gguf", rows)
    found = {}
    for name in names:
        adapter = noisy(model, SPECS[name])
        path = folder / f"{name.replace(' ', '_')}.gguf"
        deltaw.export_gguf(base, path, adapter=adapter)
        model.attach(adapter)
        ours = our_logits(model, rows)
        model.detach()
        found[name] = agreement(ours, llama_logits(folder / "base.gguf", rows, path), our_base, their_base)
    a, b = np.concatenate(our_base), np.concatenate(their_base)
    found["base"] = {
        "top1": float((a.argmax(1) == b.argmax(1)).mean()), "apart": float(np.abs(a - b).max()), "tokens": len(a),
    }  # fmt: skip
    return found, other


def _ids(tokenizer: Any, given: Sequence[str]) -> list[list[int]]:
    return [list(tokenizer(text)["input_ids"]) for text in given]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, other = compare(args.base, Path(folder), list(SPECS))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    row = {
        "bench": "gguf",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine(),
        "versions": {**versions(), "llama-cpp-python": version("llama-cpp-python"), "gguf": version("gguf")},
        "base": args.base,
        "texts": len(texts()),
        "texts_with_other_tokens": other,
        "found": found,
    }
    with (ROOT / "bench" / "results" / "gguf.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"texts that llama.cpp cuts otherwise: {other} of {len(texts())}")
    print(f"{'':14}{'top-1':>9}{'slope':>10}{'moved':>8}{'apart':>9}")
    for name, r in found.items():
        rest = f"{r['slope']:10.5f}{r['moved']:8.2f}" if "slope" in r else " " * 18
        print(f"{name:14}{r['top1']:9.2%}{rest}{r['apart']:9.4f}")


if __name__ == "__main__":
    main()
