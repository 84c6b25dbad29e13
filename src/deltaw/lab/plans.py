"""What a recipe would take, as `deltaw plan` says it: kept, so that a form can ask after each change."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from threading import Lock
from typing import Any

from deltaw.errors import BudgetError
from deltaw.lab.run_files import Plain
from deltaw.plan.memory import machine_bytes
from deltaw.train.fitting import fit, work_of_rows
from deltaw.train.planning import IMPORTS_BYTES, Planner, Work
from deltaw.train.recipe import Recipe, load_recipe

KEPT = 64
LENGTH = 512
"""Tokens of a row where there are no rows yet: what `deltaw plan` assumes."""
_FREE = ("lr", "schedule", "warmup_ratio", "final_lr_ratio", "clip", "save_every_s", "tensorboard")
"""Settings of `train` that no plan depends on."""


class Plans:
    """Plans of recipes. One is made at a time; the same settings are planned once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[str, Plain] = OrderedDict()

    def plan(self, plain: Plain) -> Plain:
        """The plan of a recipe, for a process that trains it alone on this machine.

        plan     what `deltaw plan --json` prints, or None where nothing fits the budget
        fits     whether it does, in the budget if there is one and else in the memory that is free here; None: this
                 system does not say
        why      a sentence
        assumed  whether rows of LENGTH tokens stand for rows that are not chosen yet
        lr       the learning rate that will be used

        Raises what training would raise for the recipe: RecipeError, TargetError, BaseError, DataError.
        """
        recipe = load_recipe(plain)
        key = _key(recipe)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = _planned(recipe)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            found = self._kept[key]
        return {**found, **_verdict(found, recipe), "lr": recipe.train.lr}


def _key(recipe: Recipe) -> str:
    plain = recipe.plain()
    plain["train"] = {k: v for k, v in plain["train"].items() if k not in _FREE}
    files: list[Any] = []
    for name in (recipe.data.train, recipe.data.valid):
        path = Path(name) if name else None
        files.append(path.stat().st_mtime_ns if path and path.is_file() else None)
    return json.dumps([plain, files], sort_keys=True)


def _planned(recipe: Recipe) -> Plain:
    work = work_of_rows(recipe)
    assumed = work is None
    if work is None:
        work = Work.of_rows(max(1, recipe.train.tokens_per_step // LENGTH), min(LENGTH, recipe.data.max_tokens))
    planner = Planner(recipe, work, IMPORTS_BYTES)
    if recipe.budget is None:
        return {"plan": planner.plan().plain(), "refused": None, "assumed": assumed}
    try:
        return {"plan": fit(planner, recipe.budget.memory_gb)[1].plain(), "refused": None, "assumed": assumed}
    except BudgetError as problem:
        return {"plan": None, "refused": str(problem), "assumed": assumed}


def _verdict(found: Plain, recipe: Recipe) -> Plain:
    """Whether it fits, and why, in words."""
    if found["refused"] is not None:
        return {"fits": False, "why": found["refused"]}
    needed = found["plan"]["needed_bytes"]
    moment = {"load": "while the base is loaded", "evaluation": "in an evaluation"}.get(
        found["plan"]["peak_moment"], "in a training step"
    )
    told = f"{needed / 1e9:.2f} GB are needed, at most {moment}"
    machine = machine_bytes()
    if machine is None:
        return {"fits": None, "why": f"{told}; this system does not say how much memory is free."}
    total, free = (b / 1e9 for b in machine)
    here = f"{free:.1f} GB of this machine's {total:.1f} GB are free"
    if recipe.budget is not None:
        gave_up = "; ".join(found["plan"]["gave_up"])
        told = f"{told}; the budget is {recipe.budget.memory_gb:g} GB" + (f". To fit: {gave_up}" if gave_up else "")
    largest = max(found["plan"]["bytes"].items(), key=lambda cause: cause[1])
    tail = "" if needed <= free * 1e9 else f" Most of it is {largest[0]}, {largest[1] / 1e9:.2f} GB."
    return {"fits": needed <= free * 1e9, "why": f"{told}; {here}.{tail}"}
