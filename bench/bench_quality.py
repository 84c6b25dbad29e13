"""How good is each method, rank and choice of targets, over seeds? And what does it forget?

The naive answers it must beat: LoRA at rank 16 on every linear map, and SPEC's two claims (more targets at a lower rank
beat fewer at a higher one for the same budget of parameters; attention responds better than the feed-forward maps).
What would change our mind: a difference larger than the spread of the seeds, on both tasks.

    .venv/bin/python bench/bench_quality.py --study methods ranks targets [--device cuda --jobs 8] [--seeds 0 1 2]

Each run trains for one budget of tokens with the method's default learning rate and is judged on unseen rows (exact
matches); at the first seed also on general questions and the perplexity of Wikipedia. Runs are spread over `--jobs`
processes, so this script tells nothing of time or memory (bench_methods.py does). Rows go to
bench/results/quality.jsonl, and a run that has its row is not made again. `--table` writes the tables into
docs/methods/index.md, between their marks.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from method_settings import METHODS
from workers import append, identity

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "quality.jsonl"
TASKS = ("supersense", "address_json")
STARTER = "smollm2-135m-instruct"
FORGETTING = {"general": ("data/general_mcq/questions.jsonl", "choice"), "wiki": ("data/ppl/wiki.jsonl", "perplexity")}
MARKS = re.compile(r"(<!-- quality: begin -->\n).*?(<!-- quality: end -->)", re.DOTALL)
ATTENTION, FFN = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def lora(rank: int, targets: Any = "all-linear") -> dict[str, Any]:
    return {"adapter": {"method": "lora", "rank": rank, "alpha": 2 * rank, "targets": targets}}


STUDIES: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {"base": {}, **METHODS},
    "ranks": {f"rank {r}": lora(r) for r in (1, 2, 4, 8, 16, 32, 64)},
    # SmolLM2-135M, a layer: 81,408 / 82,368 / 80,640 / 80,640 parameters
    "targets": {
        "all seven, rank 8": lora(8),
        "feed-forward, rank 13": lora(13, FFN),
        "attention, rank 21": lora(21, ATTENTION),
        "q and v, rank 42": lora(42, ["q_proj", "v_proj"]),
    },
}


def one(study: str, label: str, task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and judge once, in this process: a row."""
    import torch

    import deltaw
    from deltaw.data.source import read_rows
    from deltaw.train.evaluate import data_spec, evaluate_rows

    chosen = STUDIES[study][label]
    base = {"path": args.base, "device": args.device, **chosen.get("base", {})}
    row: dict[str, Any] = {"study": study, "label": label, "task": task, "seed": seed, "limit": args.limit}
    row |= {"budget": args.tokens, "device": args.device} | ({"base": args.base} if args.base != STARTER else {})
    row |= {"gpu": torch.cuda.get_device_name(args.device)} if args.device != "cpu" else {}
    how = {k: v for k, v in base.items() if k not in ("path", "dtype")}
    where, adapter = args.base, None
    with tempfile.TemporaryDirectory() as folder:
        if chosen:
            recipe = {
                "base": base,
                "adapter": chosen["adapter"],
                "data": {"train": str(ROOT / "data" / task / "train.jsonl"), "max_tokens": 512},
                "train": {
                    "steps": max(1, round(args.tokens / 1024)),
                    "tokens_per_step": 1024,
                    "seed": seed,
                    "save_every_s": 1e6,
                    **chosen.get("train", {}),
                },
                "eval": {"keep": "last"},
            }
            *_, done = deltaw.train(recipe, Path(folder) / "run")
            run = json.loads((Path(folder) / "run" / "run.json").read_text())
            start = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[0])
            row |= {"trainable": start["parameters"], "loss": done.loss}
            row |= {k: run["recipe"]["train"][k] for k in ("lr", "schedule")}
            row |= {"tokens": done.tokens, "settings": chosen}
            where, adapter = (args.base, done.adapter) if done.adapter else (done.model, None)
        model = deltaw.load_base(where, dtype="auto", **how)
        if adapter is not None:
            model.attach(adapter)
        spec = data_spec(model, None, 2048)
        asked = {"exact": (f"data/{task}/test.jsonl", "exact"), **(FORGETTING if seed == args.seeds[0] else {})}
        for name, (file, metric) in asked.items():
            row[name] = evaluate_rows(model, read_rows(ROOT / file)[: args.limit], metric, spec)["value"]
    return row


Key = tuple[str, str, str, int]
SAME = ("lr", "schedule", "device")
"""What the rows of a table's cell share: defaults change, and rows of older ones stay in the file."""


def newest(out: Path, base: str = STARTER, **wanted: Any) -> dict[Key, dict[str, Any]]:
    """The newest row of each run with these settings, of runs that are alike but for the seed; in the seeds' order."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    rows = [r for r in rows if r.get("base", STARTER) == base and all(r[k] == v for k, v in wanted.items())]
    last = {(row["study"], row["label"], row["task"]): [row.get(k) for k in SAME] for row in rows}
    return {
        (row["study"], row["label"], row["task"], row["seed"]): row
        for row in sorted(rows, key=lambda row: row["seed"])
        if [row.get(k) for k in SAME] == last[row["study"], row["label"], row["task"]]
    }


def work(args: argparse.Namespace) -> None:
    """Every run that is this process's and has no row yet."""
    import torch

    torch.set_num_threads(args.threads)
    there = {tuple(key) for key in json.loads(args.there)}
    runs = [
        (study, label, task, seed)
        for seed in args.seeds
        for study in args.study
        for label in STUDIES[study]
        if args.only is None or label in args.only
        for task in args.tasks
        if (seed == args.seeds[0] or label != "base") and (study, label, task, seed) not in there
    ]
    for number, (study, label, task, seed) in enumerate(runs):
        if number % args.jobs == args.job:
            row = identity("quality") | one(study, label, task, seed, args)
            append(args.out, row)
            print(f"{label:24} {task:14} seed {seed}: exact {row['exact']:.3f}", flush=True)


def spread(rows: Iterable[dict[str, Any]]) -> str:
    """Mean and standard deviation of the exact matches over seeds: "0.853 +- 0.012 (3)"."""
    values = [r["exact"] for r in rows]
    if not values:
        return "not run"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} \u00b1 {statistics.stdev(values):.3f}"


def first(by_task: list[list[dict[str, Any]]], name: str, form: str) -> str:
    """What the first seed's rows say of `name`, a value for each task."""
    found = [next((r[name] for r in part if name in r), None) for part in by_task]
    return ", ".join(form.format(v) for v in found if v is not None)


def tables() -> str:
    """A table of each study but the methods', which bench_methods.py writes: the newest row of each run, over seeds."""
    rows_there = newest(RESULTS)
    parts = []
    for study, labels in STUDIES.items():
        of_study = {k: r for k, r in rows_there.items() if k[0] == study}
        if not of_study or study == "methods":
            continue
        lines = [
            "| " + study.rstrip("s") + " | trains | supersense | address_json | general questions | wiki perplexity |"
        ]
        lines.append("|---|---|---|---|---|---|")
        for label in labels:
            by_task = [[r for k, r in of_study.items() if k[1:3] == (label, task)] for task in TASKS]
            rows = [r for part in by_task for r in part]
            if not rows:
                continue
            trainable = f"{rows[0]['trainable']:,}" if "trainable" in rows[0] else ""
            cells = [label, trainable, *map(spread, by_task)]
            cells += [first(by_task, name, form) for name, form in (("general", "{:.3f}"), ("wiki", "{:.1f}"))]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--study", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    p.add_argument("--only", nargs="+", metavar="LABEL", help="these of the studies' labels")
    p.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--tokens", type=int, default=60_000)
    p.add_argument("--limit", type=int, default=200, help="rows of each evaluation")
    p.add_argument("--base", default=STARTER)
    p.add_argument("--device", default="cpu")
    p.add_argument("--jobs", type=int, default=1, help="processes")
    p.add_argument("--threads", type=int, default=2, help="of each process")
    p.add_argument("--again", action="store_true", help="make runs that have a row, too: defaults have changed")
    p.add_argument("--job", type=int, help=argparse.SUPPRESS)
    p.add_argument("--there", help=argparse.SUPPRESS)  # what had rows when the processes began
    p.add_argument("--out", type=Path, default=RESULTS)
    p.add_argument("--table", action="store_true", help="write the tables, run nothing")
    return p.parse_args()


def main() -> None:
    args = parse()
    if args.table:
        page = ROOT / "docs" / "methods" / "index.md"
        text = page.read_text()
        page.write_text(MARKS.sub(lambda m: m[1] + tables() + m[2], text))
        return
    if args.job is not None:
        work(args)
        return
    known = [] if args.again else list(newest(args.out, args.base, limit=args.limit, budget=args.tokens))
    there = json.dumps(known)
    command = [sys.executable, __file__, *sys.argv[1:], "--there", there]
    parts = [subprocess.Popen([*command, "--job", str(j)]) for j in range(args.jobs)]
    if failed := [p.returncode for p in parts if p.wait()]:
        sys.exit(f"{len(failed)} of {args.jobs} processes failed; the rows of the others are there.")


if __name__ == "__main__":
    main()
