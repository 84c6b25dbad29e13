"""A few real steps in a process of their own, and what they took: the check of a plan.

    python -m deltaw.train.measure < request.json      (what `measured` does)

The process does what `train` does in the same order, and nothing else: imports, load, attach, optimizer, steps.
"""

from __future__ import annotations

import json
import subprocess
import sys

import torch

from deltaw.data.task import given_labels
from deltaw.data.template import Example
from deltaw.errors import BaseError, WorkFailed
from deltaw.model.base import load_base
from deltaw.ops import pool
from deltaw.plan.memory import forget_peak, peak_bytes, release_free_memory, resident_bytes
from deltaw.plan.plan import Plan
from deltaw.train.planning import Documents, Planner
from deltaw.train.recipe import Recipe, load_recipe

STEPS = 3


def measured(planner: Planner, recipe: Recipe, steps: int = STEPS) -> dict[str, int]:
    """Bytes of resident memory in a fresh process: {"start", "loaded", "load_peak", "step_peak", "peak", "growth"}.

    Rows are random tokens of the planned lengths. Raises BaseError for a shape without weights and where the system
    does not tell, WorkFailed when the process fails.
    """
    if planner.folder is None:
        raise BaseError(
            f"{recipe.base.path!r} is a shape without weights: there is nothing to run, so --measure cannot be.\n"
            "  Give a base's folder, or leave --measure out."
        )
    path = str(planner.folder)
    plain = recipe.plain()
    request = {
        "recipe": plain | {"base": plain["base"] | {"path": path}, "budget": None},
        "documents": list(planner.work.step),
        "common": planner.work.common,
        "steps": steps,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "deltaw.train.measure"], input=json.dumps(request), capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        killed = " (killed: not enough memory?)" if done.returncode == -9 else ""
        raise WorkFailed(f"the measured steps failed{killed}: {last}")
    found: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def compared(plan: Plan, found: dict[str, int]) -> dict[str, dict[str, float]]:
    """Planned beside measured: {"peak": {"planned", "measured", "error"}, ...}, error relative to the measured."""
    pairs = {
        "peak": (plan.peak_bytes, found["peak"]),
        "loaded": (plan.after_load_bytes, found["loaded"]),
        "growth": (plan.growth_bytes, found["growth"]),
    }
    return {k: {"planned": p, "measured": m, "error": round((p - m) / m, 4)} for k, (p, m) in pairs.items() if m > 0}


def run_steps(recipe: Recipe, documents: Documents, common: int, steps: int) -> dict[str, int]:
    """Load, attach and step in this process. Raises BaseError where memory cannot be read."""
    from deltaw.train import run  # noqa: F401  (what a run has imported counts)
    from deltaw.train.loop import Loop

    start = resident_bytes()
    if start is None:
        raise BaseError("this system does not say how much memory a process has (no /proc): --measure needs Linux.")
    pool.start()
    b = recipe.base
    labels = given_labels(recipe.data)
    model = load_base(b.path, b.format, b.dtype, block=b.block, double_quant=b.double_quant, labels=labels)
    release_free_memory()
    loaded, load_peak = resident_bytes() or 0, peak_bytes() or 0
    forget_peak()
    model.attach(recipe.adapter, seed=0)
    vocabulary = model.net.config.get_text_config().vocab_size
    examples = _random(documents, common, vocabulary, len(model.task.labels))
    loop = Loop(model, examples, recipe, None)
    for _ in loop.run():
        pass
    step_peak = peak_bytes() or 0
    return {
        "start": start,
        "loaded": loaded,
        "load_peak": load_peak,
        "step_peak": step_peak,
        "peak": max(load_peak, step_peak),
        "growth": step_peak - loaded,
        "steps": steps,
    }


def _random(documents: Documents, common: int, vocabulary: int, n_labels: int) -> list[Example]:
    rng = torch.Generator().manual_seed(0)
    begin = torch.randint(vocabulary, (common,), generator=rng)
    made = []
    for n, t in documents:
        ids = torch.randint(vocabulary, (n,), generator=rng)
        ids[:common] = begin[:n]
        if n_labels:
            ids[-1] %= n_labels
        made.append(Example(tuple(ids.tolist()), tuple(i >= n - t for i in range(n)), ""))
    return made


def _main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    plain = request["recipe"]
    documents = [(int(n), int(t)) for n, t in request["documents"]]
    tokens = sum(n for n, _ in documents)
    plain["train"] |= {"steps": request["steps"], "tokens_per_step": tokens, "epochs": 1}
    print(json.dumps(run_steps(load_recipe(plain), documents, request["common"], request["steps"])))


if __name__ == "__main__":
    _main()
