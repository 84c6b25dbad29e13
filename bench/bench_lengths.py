"""How do time and memory per token grow with the length of documents?

The naive answer it must beat: HF PEFT's step, in the better of bf16 without and with autocast at each length; ours may
not lose its lead where attention matters most. What would change our mind: a length at which PEFT is as fast or needs
less memory.

    .venv/bin/python bench/bench_lengths.py [--steps 3] [--lengths 128 256 512 1024 2048 4096] [--tokens 2048]

The step is bench_train.py's with --tokens tokens in documents of one length, at least one document. At each length ours
steps in turn with the one PEFT, then with the other, each time as fresh workers: memory's peak would stay from a longer
one, and three at 4,096 tokens would not fit in 24 GB. Prints a table; appends one JSON row to
bench/results/train_step.jsonl and draws docs/images/lengths.svg from it (needs matplotlib: the extra `docs`); `--plot`
only draws the newest row. Memory in the picture is what a step takes beyond the loaded model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench_train import EAGER, base_folder, starts, step_arguments
from workers import HERE, append, check_same_work, compared, figures, identity, said, started, take_turns

PICTURE = HERE.parent / "docs" / "images" / "lengths.svg"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--warm", type=int, default=1, help="steps of each before the first that counts")
    p.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512, 1024, 2048, 4096])
    p.add_argument("--tokens", type=int, default=2048, help="of a step; a longer document is a step by itself")
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=HERE / "results" / "train_step.jsonl")
    p.add_argument("--picture", type=Path, default=PICTURE)
    p.add_argument("--plot", action="store_true", help="only draw the newest row of --out")
    return p.parse_args()


def at_length(args: argparse.Namespace, length: int) -> dict[str, Any]:
    """Ours against each PEFT at one length, and which of them is PEFT's best."""
    pairs = {name: pair(args, length, name) for name in EAGER}
    best = min(pairs, key=lambda name: pairs[name]["compared"]["speed"]["median"])
    print(f"{length:5} tokens: {said(pairs[best]['compared'])}", flush=True)
    return {"length": length, "peft_best": best, "pairs": pairs}


def pair(args: argparse.Namespace, length: int, peer: str) -> dict[str, Any]:
    """Ours and one PEFT in turn: their figures and how they compare."""
    sizes = argparse.Namespace(**vars(args) | {"length": length, "batch": max(1, args.tokens // length)})
    n_tokens = sizes.batch * length
    with started(starts(["deltaw", peer], step_arguments(sizes, base_folder(args)), None)) as workers:
        rows, first = take_turns(workers, args.steps, args.warm)
    tools = {name: figures(steps, first[name], n_tokens) for name, steps in rows.items()}
    check_same_work({name: t["losses"][0] for name, t in tools.items()})
    for name, t in tools.items():
        t["ms_per_token"] = round(1000 * t["median_s"] / n_tokens, 4)
        t["step_mb_per_1k"] = t["step_mb"] and round(1000 * t["step_mb"] / n_tokens, 1)
        memory = f"peak {t['peak_rss_mb']} MB, of that a step's {t['step_mb']} MB"
        print(f"{length:5} tokens: {name:14} {t['ms_per_token']:.3f} ms a token, {memory}", flush=True)
    return {"batch": sizes.batch, "compared": compared(rows, "deltaw", peer), "tools": tools}


def plot(row: dict[str, Any], picture: Path) -> None:
    """Two panels over length: time a token and the step's memory per 1,000 tokens; one line a tool."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "deltaw"
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    lengths = [found["length"] for found in row["lengths"]]
    panels = (("ms_per_token", "ms a token"), ("step_mb_per_1k", "a step's MB per 1,000 tokens"))
    pairs = [(found["peft_best"], found["pairs"][found["peft_best"]]["tools"]) for found in row["lengths"]]
    for axis, (key, label) in zip(axes, panels, strict=True):
        ours, best = [tools["deltaw"][key] for _, tools in pairs], [tools[name][key] for name, tools in pairs]
        axis.plot(lengths, ours, marker="o", label="deltaw")
        axis.plot(lengths, best, marker="s", label="HF PEFT, the faster of with and without autocast")
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axis.set(xlabel="tokens of a document", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    args = parse()
    if args.plot:
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
        plot([row for row in rows if row["bench"] == "lengths"][-1], args.picture)
        return
    sizes = {name: getattr(args, name) for name in ("base", "tokens", "dtype", "threads", "steps", "warm")}
    row = identity("lengths", ("peft",)) | {"sizes": sizes | {"rank": 16, "seed": 0}}
    row["lengths"] = [at_length(args, length) for length in args.lengths]
    append(args.out, row)
    plot(row, args.picture)


if __name__ == "__main__":
    main()
