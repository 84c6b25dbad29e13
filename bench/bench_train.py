"""Is our training step faster than HF PEFT's on the same machine, in how much memory, and how near to its products?

The naive answers it must beat: PEFT's eager step on SDPA, in the better of bf16 without and with autocast, and PEFT on
bitsandbytes' NF4; with `--tools` also torch.compile of PEFT's model (minutes to compile, reported apart). `bound` is
the step's matrix products alone, through PyTorch (bound_step.py): the share that we reach says what is left to gain.
What would change our mind: a ratio that moves by over 10 % between calls.

    .venv/bin/python bench/bench_train.py [--steps 5] [--batch 8] [--length 256] [--tools TOOL ...]
    .venv/bin/python bench/bench_train.py --base synthetic-1.5b --folder DIR --batch 2

All tools are workers of this process and step in turn, so that a shared machine does not bend the ratios. The first
steps of each (`--warm`) are not counted. Ratios are of paired steps: their median and range. Prints a table, with
memory's peak over all and since loading ended; appends one JSON row to bench/results/train_step.jsonl.
`--base synthetic-1.5b` is a Llama of 24 layers with random weights, written once into --folder (3 GB), for at most four
tools at once. Workers keep what their allocators keep: the six tools of a plain call hold 19 GB, so that `peft-compile`
needs a call with fewer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from workers import (
    HERE,
    Rows,
    Worker,
    append,
    check_same_work,
    compared,
    figures,
    identity,
    median_s,
    said,
    spread,
    started,
    take_turns,
)

OURS, PEFT, BOUND = "ours_step.py", "peers/peft_step.py", "bound_step.py"
TOOLS: dict[str, tuple[str, list[str]]] = {
    "deltaw": (OURS, []),
    "deltaw-nf4": (OURS, ["--format", "nf4"]),
    "peft": (PEFT, []),
    "peft-autocast": (PEFT, ["--autocast"]),
    "peft-compile": (PEFT, ["--compile"]),
    "peft-compile-autocast": (PEFT, ["--compile", "--autocast"]),
    "peft-nf4": (PEFT, ["--nf4", "--autocast"]),
    "bound": (BOUND, []),
}
EAGER, COMPILED = ("peft", "peft-autocast"), ("peft-compile", "peft-compile-autocast")
SYNTHETIC = "synthetic-1.5b"
SHAPE = "--hidden 2048 --inner 8192 --layers 24 --heads 32 --kv-heads 8 --vocab 32000".split()  # noqa: SIM905
FOR_SYNTHETIC = ["deltaw", "deltaw-nf4", "peft", "peft-nf4"]
SIZES = ("base", "batch", "length", "dtype", "threads", "steps", "warm")
NO_AMX = "AVX512_CORE_BF16"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", default="smollm2-135m-instruct", help=f"any base, or {SYNTHETIC}")
    p.add_argument("--folder", type=Path, help=f"where {SYNTHETIC} is, or is to be written")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--warm", type=int, default=2, help="steps of each before the first that counts")
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--tools", nargs="+", choices=list(TOOLS), help=f"all but the compiled; of {SYNTHETIC}: four")
    p.add_argument("--isa", help=f"run deltaw and bound also with this ONEDNN_MAX_CPU_ISA ({NO_AMX} where AMX is)")
    p.add_argument("--out", type=Path, default=HERE / "results" / "train_step.jsonl")
    args = p.parse_args()
    if args.base == SYNTHETIC:
        args.tools = args.tools or FOR_SYNTHETIC
        if args.folder is None or len(args.tools) > 4:
            p.error(f"{SYNTHETIC} needs --folder DIR and at most four tools")
    args.tools = args.tools or [name for name in TOOLS if name not in COMPILED]
    return args


def base_folder(args: argparse.Namespace) -> Path:
    """The base; the synthetic one is written if it is not there."""
    from deltaw.model.load import resolve_base

    if args.base != SYNTHETIC:
        return resolve_base(args.base)
    folder = args.folder / SYNTHETIC
    if not (folder / "tokenizer_config.json").exists():  # its last file
        subprocess.run([sys.executable, str(HERE / "synthetic_llama.py"), str(folder), *SHAPE], check=True)
    return folder


def step_arguments(args: argparse.Namespace, base: Path) -> list[str]:
    """What every step worker is told."""
    sizes = ["--batch", str(args.batch), "--length", str(args.length)]
    return ["--base", str(base), *sizes, "--dtype", args.dtype, "--threads", str(args.threads)]


def starts(tools: list[str], shared: list[str], isa: str | None) -> dict[str, partial[Worker]]:
    """How to start each tool; with `isa` deltaw and bound once more."""
    fresh = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}  # what compiling takes, not what an earlier call has left
    found = {name: partial(Worker, TOOLS[name][0], shared + TOOLS[name][1], env=fresh) for name in tools}
    for name in (n for n in ("deltaw", "bound") if isa and n in tools):
        found[f"{name}-isa"] = partial(Worker, TOOLS[name][0], shared, env={"ONEDNN_MAX_CPU_ISA": isa})
    return found


def fastest(rows: Rows, names: tuple[str, ...]) -> str | None:
    """The one of `names` with the lowest median, of those that ran."""
    return min((n for n in names if n in rows), key=lambda n: median_s(rows, n), default=None)


def comparisons(rows: Rows) -> list[dict[str, Any]]:
    """Every comparison whose two tools ran."""
    eager, compiled = fastest(rows, EAGER), fastest(rows, COMPILED)
    wanted = [("deltaw", eager), ("deltaw", compiled), ("deltaw-nf4", "peft-nf4"), ("deltaw-nf4", "deltaw")]
    wanted += [("deltaw-nf4", eager), ("deltaw", "deltaw-isa"), ("bound", "bound-isa")]
    return [compared(rows, a, b) for a, b in wanted if a in rows and b in rows]


def shares(rows: Rows, gflop: float | None) -> dict[str, dict[str, Any]]:
    """How much of the bound a tool reaches: the bound's seconds over its own, by paired steps."""
    found = {}
    for tool, bound in (("deltaw", "bound"), ("deltaw-isa", "bound-isa"), ("deltaw-nf4", "bound")):
        if tool in rows and bound in rows:
            share = spread([b["seconds"] / a["seconds"] for a, b in zip(rows[tool], rows[bound], strict=True)])
            speed = gflop and round(gflop / median_s(rows, bound), 1)
            found[tool] = share | {"gflop": gflop, "bound_gflop_per_s": speed}
    return found


def main() -> None:
    args = parse()
    head = identity("train_step", ("peft", "bitsandbytes"))
    isa = args.isa or (NO_AMX if head["machine"]["amx"] else None)
    with started(starts(args.tools, step_arguments(args, base_folder(args)), isa)) as workers:
        rows, first = take_turns(workers, args.steps, args.warm)
        gflop = workers["bound"].ready["gflop"] if "bound" in workers else None
    tools = {name: figures(steps, first[name], args.batch * args.length) for name, steps in rows.items()}
    for group in (("deltaw", *EAGER, *COMPILED), ("deltaw-nf4", "peft-nf4")):
        check_same_work({name: tools[name]["losses"][0] for name in group if name in tools})
    for name in (n for n in COMPILED if n in rows):
        beyond = sum(s["seconds"] for s in first[name]) - len(first[name]) * median_s(rows, name)
        tools[name]["compile_s"] = round(beyond, 1)
    row = head | {
        "sizes": {name: getattr(args, name) for name in SIZES} | {"rank": 16, "seed": 0},
        "isa": isa,
        "tools": tools,
        "compared": comparisons(rows),
        "share_of_bound": shares(rows, gflop),
    }
    report(row)
    append(args.out, row)


def report(row: dict[str, Any]) -> None:
    """Print the table and what follows from it."""
    print(f"{'tool':22} {'median s':>9} {'range':>17} {'tokens/s':>9} {'peak MB':>8} {'training':>8}  losses")
    for name, t in row["tools"].items():
        span = f"{t['min_s']:.3f} to {t['max_s']:.3f}"
        peak = f"{t['peak_rss_mb'] or 0:8.0f} {t['training_mb'] or 0:8.0f}"
        losses = f"{t['losses'][0]} to {t['losses'][-1]}" if any(t["losses"]) else ""
        print(f"{name:22} {t['median_s']:9.3f} {span:>17} {t['tokens_per_s']:9.1f} {peak}  {losses}")
        if "compile_s" in t:
            print(f"{'':22} and {t['compile_s']:.0f} s to compile")
    for found in row["compared"]:
        print(said(found))
    for tool, s in row["share_of_bound"].items():
        speed = f"{s['gflop']:.0f} GFLOP at {s['bound_gflop_per_s']:.0f} GFLOP/s"
        print(f"{tool}: {s['median']:.0%} of the bound ({s['low']:.0%} to {s['high']:.0%}; {speed})")
    print(f"AMX: {'yes' if row['machine']['amx'] else 'no'}; ONEDNN_MAX_CPU_ISA of the -isa tools: {row['isa']}")


if __name__ == "__main__":
    main()
