"""Does LoRA stall at a high rank where rsLoRA does not (arXiv:2312.03732, figure 1)?

The naive answer it must beat: the scale does not matter, since the learning rate can make up for it. What would change
our mind: plain scaling at rank 256 learning as fast as at rank 16 at the same rate.

    .venv/bin/python bench/bench_rslora.py [--tokens 24000] [--ranks 4 16 64 256]

Trains supersense at alpha 16 and one learning rate with both scales at each rank. Prints the loss of the last tenth of
the steps and the first gradient norm of each run; appends a JSON row to bench/results/rslora.jsonl with the loss
curves; `--plot` draws docs/images/rslora.svg from the newest row (needs matplotlib: the extra `docs`).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "rslora.jsonl"
PICTURE = ROOT / "docs" / "images" / "rslora.svg"


def curve(rank: int, rslora: bool, tokens: int, lr: float) -> dict[str, list[float]]:
    """Loss and gradient norm of each step."""
    import deltaw

    recipe = {
        "base": {"path": "smollm2-135m-instruct", "dtype": "auto"},
        "adapter": {"method": "lora", "rank": rank, "alpha": 16, "rslora": rslora},
        "data": {"max_tokens": 512},
        "train": {"steps": max(2, tokens // 1024), "tokens_per_step": 1024, "lr": lr, "save_every_s": 1e6, "clip": 0.0},
        "eval": {"keep": "last"},
    }
    with tempfile.TemporaryDirectory() as folder:
        events = deltaw.train(recipe, Path(folder) / "run", train_rows=ROOT / "data" / "supersense" / "train.jsonl")
        steps = [e for e in events if type(e).__name__ == "Step"]
    return {"loss": [s.loss for s in steps], "grad_norm": [s.grad_norm for s in steps]}


def plot(row: dict[str, Any]) -> None:
    """Two panels, one a scale: loss over steps, one line a rank."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "deltaw"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    shades = plt.get_cmap("viridis")
    ranks = sorted({c["rank"] for c in row["curves"]})
    for axis, rslora, title in ((axes[0], False, "alpha / r (LoRA)"), (axes[1], True, "alpha / sqrt(r) (rsLoRA)")):
        for c in (c for c in row["curves"] if c["rslora"] == rslora):
            shade = shades(0.85 * ranks.index(c["rank"]) / max(1, len(ranks) - 1))
            axis.plot(c["loss"], color=shade, label=f"rank {c['rank']}")
        axis.set(title=f"scale {title}", xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("training loss")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=24_000)
    p.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64, 256])
    p.add_argument("--lr", type=float, default=5e-4)
    p.add_argument("--plot", action="store_true", help="only draw the newest row")
    args = p.parse_args()
    if args.plot:
        plot(json.loads(RESULTS.read_text().splitlines()[-1]))
        return
    from deltaw.train.checkpoint import machine, versions

    curves = []
    for rank in args.ranks:
        for rslora in (False, True):
            found = curve(rank, rslora, args.tokens, args.lr)
            tail = found["loss"][-max(1, len(found["loss"]) // 10) :]
            curves.append({"rank": rank, "rslora": rslora, "last_loss": statistics.mean(tail), **found})
            name, last, first = "rsLoRA" if rslora else "LoRA", curves[-1]["last_loss"], found["grad_norm"][0]
            print(f"rank {rank:4} {name:7} loss {last:.4f}  first gradient {first:.3f}", flush=True)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    row = {
        "bench": "rslora",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine() | {"cpu": platform.processor() or None},
        "versions": versions(),
        "lr": args.lr,
        "alpha": 16,
        "tokens": args.tokens,
        "curves": curves,
    }
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
