"""How long is one epoch from a file to a saved adapter, through the commands that users call?

The naive answers it must beat: TRL's SFTTrainer with its defaults (peers/trl_supersense.py) and TRL at its best: rows
of like length in a batch, no gradient checkpointing, the batch size and autocast that are fastest in a short trial.
What would change our mind: a ratio that moves by over 10 % between calls, or an accuracy outside 0.02 of TRL's.

    .venv/bin/python bench/bench_epoch.py --steps 20 --trial 6 [--peer-python PYTHON]
    .venv/bin/python bench/bench_epoch.py --seeds 0 1 2 [--tools deltaw]

With --steps the tools are workers of this process and take that many optimizer steps in turn; their tokens a second,
without padding, and the seconds until they are ready project the epoch. Without it whole epochs run one after the
other: each command's whole time. --seeds trains whole epochs of ours with these seeds too (TRL with the first alone,
where --steps is not given) and scores adapters by `deltaw eval --metric exact`. --trial first steps TRL with several
settings and takes the fastest for trl-best. Prints a table; appends one JSON row to bench/results/epoch.jsonl. TRL
comes with the extra `peers`; --peer-python is an environment that has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from workers import HERE, Worker, append, identity, spread, started, take_turns

ROOT = HERE.parent
DATA = ROOT / "data" / "supersense"
TOOLS = ("deltaw", "trl", "trl-best")


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "supersense.yaml")
    p.add_argument("--train", type=Path, default=DATA / "train.jsonl")
    p.add_argument("--test", type=Path, default=DATA / "test.jsonl")
    p.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    p.add_argument("--steps", type=int, help="optimizer steps of each, in turn; none: whole epochs")
    p.add_argument("--warm", type=int, default=2, help="steps of each before the first that counts")
    p.add_argument("--seeds", type=int, nargs="+", help="whole epochs of ours with these seeds, and accuracy")
    p.add_argument("--limit", type=int, default=600, help="test rows to score")
    p.add_argument("--batch", type=int, default=16, help="of trl-best")
    p.add_argument("--group-by-length", action=argparse.BooleanOptionalAction, default=True, help="of trl-best")
    p.add_argument("--autocast", action=argparse.BooleanOptionalAction, default=True, help="of trl-best")
    p.add_argument("--trial", type=int, help="steps to try each setting of trl-best with; the fastest is taken")
    p.add_argument("--trial-batches", type=int, nargs="+", default=[8, 16, 32])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--peer-python", default=sys.executable)
    p.add_argument("--out", type=Path, default=HERE / "results" / "epoch.jsonl")
    args = p.parse_args()
    wants_trl = args.trial or set(args.tools) != {"deltaw"}
    if wants_trl and subprocess.run([args.peer_python, "-c", "import trl"], capture_output=True).returncode:
        p.error(f"{args.peer_python} has no TRL: install the extra peers there, or give --peer-python")
    return args


# What is run ---------------------------------------------------------------------------------------------------------


def ours(args: argparse.Namespace, seed: int) -> list[str]:
    """The recipe and its settings; no evaluation, as TRL has none."""
    settings = {"base.path": args.base, "data.train": args.train.resolve(), "data.valid": "null"}
    settings |= {"train.seed": seed, "train.threads": args.threads}
    return [str(args.recipe), *(f"{key}={value}" for key, value in settings.items())]


def trl(args: argparse.Namespace, tool: str, seed: int) -> list[str]:
    """The flags of trl_supersense.py."""
    flags = [
        "--base",
        str(args.folder),
        "--train",
        str(args.train),
        "--seed",
        str(seed),
        "--threads",
        str(args.threads),
    ]
    if tool == "trl-best":
        flags += ["--no-checkpointing", "--batch", str(args.batch)]
        flags += ["--group-by-length"] * args.group_by_length + ["--no-autocast"] * (not args.autocast)
    return flags


def worker(args: argparse.Namespace, tool: str, out: Path) -> Worker:
    """A tool that steps in turn."""
    if tool == "deltaw":
        return Worker("ours_epoch.py", [*ours(args, 0), "--out", str(out)])
    return Worker("peers/trl_step.py", trl(args, tool, 0), python=args.peer_python)


def deltaw(*words: object) -> dict[str, Any]:
    """Run one command with --json; its last line."""
    return last_line([str(Path(sys.executable).parent / "deltaw"), *map(str, words), "--json"])


def last_line(command: list[str]) -> dict[str, Any]:
    """What a program printed last. Raises SystemExit with its errors if it failed."""
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{done.stderr[-3000:]}\n{command} ended with {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


# Slices and whole epochs ---------------------------------------------------------------------------------------------


def slices(args: argparse.Namespace, tools: dict[str, argparse.Namespace], steps: int) -> dict[str, dict[str, Any]]:
    """Steps in turn: what each tool projects. `tools` are names with their settings."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(
            {name: partial(worker, given, given.tool, Path(folder) / name) for name, given in tools.items()}
        ) as workers,
    ):
        rows, _ = take_turns(workers, steps, args.warm)
        ready = {name: w.ready | {"start_s": w.start_s} for name, w in workers.items()}
    found = {}
    for name, taken in rows.items():
        seconds, tokens = (sum(step[key] for step in taken) for key in ("seconds", "tokens"))
        found[name] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "by_step": spread([step["tokens"] / step["seconds"] for step in taken], 1),
            "start_s": round(ready[name]["start_s"], 1),
            "projected_s": round(ready[name]["start_s"] + ready[name]["tokens_per_epoch"] * seconds / tokens, 1),
            "padding": round(sum(step["padding"] for step in taken) / tokens, 3),
            "peak_rss_mb": taken[-1]["peak_rss_mb"],
            "losses": [round(step["loss"], 4) for step in taken],
            "rates": [round(step["tokens"] / step["seconds"], 2) for step in taken],
        } | {key: ready[name].get(key) for key in ("tokens_per_epoch", "steps", "settings", "versions")}
    return found


def whole(args: argparse.Namespace, tool: str, seed: int, out: Path) -> dict[str, Any]:
    """One epoch by the tool's command, from its start to the saved adapter; its accuracy when seeds were asked for."""
    began = time.perf_counter()
    if tool == "deltaw":
        done = deltaw("train", *ours(args, seed), "--out", out)
        found = {"train_s": done["seconds"], "steps": done["steps"]}
    else:
        script = str(HERE / "peers" / "trl_supersense.py")
        done = last_line([args.peer_python, script, *trl(args, tool, seed), "--save", str(out)])
        found = {"train_s": done["train_seconds"], "steps": done["steps"], "settings": done["settings"]}
    wall_s = round(time.perf_counter() - began, 1)
    found = {"seed": seed, "wall_s": wall_s} | found
    found |= {key: done[key] for key in ("tokens", "tokens_per_s", "peak_rss_mb")}
    if args.seeds:
        scored = ["--data", args.test, "--limit", args.limit, "--metric", "exact"]
        result = deltaw("eval", "--base", args.folder, "--adapter", out, *scored)
        found |= {"metric": "exact", "value": result["value"], "n": result["n"]}
    print(f"{tool:9} seed {seed}: {wall_s} s, {found['peak_rss_mb']} MB, exact {found.get('value')}", flush=True)
    return found


# One call ------------------------------------------------------------------------------------------------------------


def tried(args: argparse.Namespace) -> dict[str, Any]:
    """Step trl-best with several settings, one after the other; `args` gets the fastest. Rates by setting."""
    rates = {}
    for batch in args.trial_batches:
        for autocast in (True, False):
            given = argparse.Namespace(**vars(args) | {"batch": batch, "autocast": autocast, "tool": "trl-best"})
            name = f"batch {batch}, autocast {autocast}"
            rates[name] = slices(args, {name: given}, args.trial)[name]["tokens_per_s"]
            print(f"trial: {name}: {rates[name]} tokens/s", flush=True)
            if rates[name] == max(rates.values()):
                best = (batch, autocast)
    args.batch, args.autocast = best
    print(f"trl-best: batch {args.batch}, autocast {args.autocast}", flush=True)
    return rates


def main() -> None:
    from deltaw.model.load import resolve_base

    args = parse()
    args.folder = resolve_base(args.base)
    row = identity("epoch") | {"base": args.base, "threads": args.threads, "data": args.train.name}
    row["trial"] = tried(args) if args.trial else None
    if args.steps:
        row["slices"] = slices(args, {t: argparse.Namespace(**vars(args), tool=t) for t in args.tools}, args.steps)
        row["ratios"] = compare(row["slices"])
    epochs: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for tool in args.tools:
            seeds = (args.seeds or [0]) if tool == "deltaw" else (args.seeds or [0])[:1]
            if not args.steps or (args.seeds and tool == "deltaw"):
                epochs[tool] = [whole(args, tool, seed, Path(folder) / f"{tool}-{seed}") for seed in seeds]
    append(args.out, row | {"epochs": epochs})


def compare(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Print the table; ours over each peer: tokens a second, by turns, and projected epochs."""
    for name, t in found.items():
        told = f"{t['tokens_per_s']:7.1f} tokens/s, padding {t['padding']:.0%}, peak {t['peak_rss_mb']} MB"
        print(f"{name:9} {told}, epoch {t['projected_s']:.0f} s with {t['start_s']} s to begin")
    ratios = {}
    for name in (n for n in found if n != "deltaw" and "deltaw" in found):
        pairs = zip(found["deltaw"]["rates"], found[name]["rates"], strict=True)
        whole_run = round(found[name]["projected_s"] / found["deltaw"]["projected_s"], 3)
        tokens = round(found["deltaw"]["tokens_per_s"] / found[name]["tokens_per_s"], 3)
        ratios[name] = {"tokens_per_s": tokens, "by_turn": spread([a / b for a, b in pairs]), "epoch": whole_run}
        s = ratios[name]["by_turn"]
        print(
            f"deltaw: {tokens:.2f}x {name}'s tokens/s ({s['low']:.2f} to {s['high']:.2f}), its epoch {whole_run:.2f}x"
        )
    return ratios


if __name__ == "__main__":
    main()
