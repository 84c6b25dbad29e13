"""What the lab's tables show: src/deltaw/lab/tables.json, made from bench/results, since a package carries no bench.

    .venv/bin/python bench/lab_tables.py

The rows are those of bench_methods.py's and bench_quality.py's tables and the newest of each configuration of
bench_plan.py, as numbers, with the machines and dates that they come from. A test compares the file with this.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_methods import TASKS, mergeable, rows_there
from bench_quality import RESULTS as QUALITY
from bench_quality import STUDIES, Key, newest
from method_settings import METHODS

OUT = Path(__file__).resolve().parent.parent / "src" / "deltaw" / "lab" / "tables.json"
PLAN = Path(__file__).resolve().parent / "results" / "plan.jsonl"
Row = dict[str, Any]


def lab_tables() -> Row:
    """Everything that the page of tables shows."""
    costs, judged = rows_there(), newest(QUALITY)
    planned = {row["label"]: row for row in map(json.loads, PLAN.read_text(encoding="utf-8").splitlines())}
    methods = [_method(label, costs, judged) for label in ("base", *METHODS)]
    trained = [row for (label, _), row in costs.items() if label in METHODS]
    return {
        "tasks": list(TASKS),
        "methods": [row for row in methods if row is not None],
        "cost_source": _source("bench/bench_methods.py", trained) | {"tokens": _one(r["budget"] for r in trained)},
        "quality_source": _source("bench/bench_quality.py", judged.values())
        | {"tokens": _one(r["budget"] for r in judged.values()), "rows": _one(r["limit"] for r in judged.values())},
        "studies": [{"study": s, "rows": _study(s, judged)} for s in STUDIES if s != "methods"],
        "memory": [_memory(row) for row in planned.values()],
        "memory_source": _source("bench/bench_plan.py", planned.values()),
    }


def _method(label: str, costs: dict[tuple[str, str], Row], judged: dict[Key, Row]) -> Row | None:
    there = {task: costs[label, task] for task in TASKS if (label, task) in costs}
    good = _good("methods", label, judged)
    if not there or not any(good["exact"].values()):
        return None
    row: Row = {"label": label, **good}
    if label != "base":
        first = next(iter(there.values()))
        row |= {
            "trainable": first["trainable"],
            "percent": first["trainable_percent"],
            "seconds": {task: r["train_seconds"] for task, r in there.items()},
            "peak_mb": max(r["peak_rss_mb"] for r in there.values()),
            "file_mb": first["size_mb"],
            "mergeable": mergeable(METHODS[label]["adapter"]),
        }
    return row


def _study(study: str, judged: dict[Key, Row]) -> list[Row]:
    found = []
    for label in STUDIES[study]:
        rows = [r for k, r in judged.items() if k[:2] == (study, label)]
        if rows:
            found.append({"label": label, "trainable": rows[0].get("trainable"), **_good(study, label, judged)})
    return found


def _good(study: str, label: str, judged: dict[Key, Row]) -> Row:
    """Exact matches over seeds, and the first seed's general questions and perplexity, by task."""
    by_task = {task: [r for k, r in judged.items() if k[:3] == (study, label, task)] for task in TASKS}
    exact = {}
    for task, rows in by_task.items():
        values = [r["exact"] for r in rows]
        spread = statistics.stdev(values) if len(values) > 1 else None
        exact[task] = {"mean": statistics.mean(values), "deviation": spread, "seeds": len(values)} if values else None
    one_seed = {
        name: {task: next((r[name] for r in rows if name in r), None) for task, rows in by_task.items()}
        for name in ("general", "wiki")
    }
    return {"exact": exact, **one_seed}


def _memory(row: Row) -> Row:
    peak = row["errors"]["peak"]
    causes = {k: v for k, v in row["planned"]["moments"][row["planned"]["peak_moment"]].items() if v}
    return {"label": row["label"], "planned": peak["planned"], "measured": peak["measured"], "causes": causes}


def _source(script: str, rows: Iterable[Row]) -> Row:
    """Which script, on which machines, with which torch, and when."""
    rows = list(rows)
    dates = sorted(r["when"][:10] for r in rows if "when" in r)
    return {
        "script": script,
        "machines": sorted({_machine(r) for r in rows}),
        "torch": sorted({r["versions"]["torch"] for r in rows if "versions" in r}),
        "first": dates[0] if dates else None,
        "last": dates[-1] if dates else None,
    }


def _machine(row: Row) -> str:
    if "gpu" in row:
        return str(row["gpu"])
    m = row["machine"]
    n = m["threads"]
    cpu = f", {m['cpu']}" if m.get("cpu") else ""
    return f"{n} thread{'s' * (n > 1)} of {m['architecture']} with {m['isa']}{' and AMX' if m['amx'] else ''}{cpu}"


def _one(values: Iterable[int]) -> int | None:
    found = set(values)
    return found.pop() if len(found) == 1 else None


def write_lab_tables() -> None:
    """Write the file."""
    OUT.write_text(json.dumps(lab_tables(), indent=1) + "\n", encoding="ascii")


if __name__ == "__main__":
    write_lab_tables()
