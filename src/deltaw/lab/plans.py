"""What a recipe would take, as `deltaw plan` says it: kept, so that a form can ask after each change."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from threading import Lock
from typing import Any

from deltaw.data import hub
from deltaw.data.source import read_rows
from deltaw.data.template import Example
from deltaw.errors import BudgetError, DataError
from deltaw.lab.run_files import Plain
from deltaw.plan.kept import Kept
from deltaw.plan.memory import machine_bytes
from deltaw.train.fitting import encoded_rows, fit, work_of
from deltaw.train.planning import IMPORTS_BYTES, Planner, Work
from deltaw.train.recipe import Recipe, load_recipe

KEPT, KEPT_ROWS = 64, 2
"""Plans that are remembered, and files of rows as tokens."""
LENGTH = 512
"""Tokens of a row where there are no rows yet: what `deltaw plan` assumes."""
_FREE = ("lr", "schedule", "warmup_ratio", "final_lr_ratio", "clip", "save_every_s", "tensorboard")
"""Settings of `train` that no plan depends on."""


_Rows = tuple[list[Example], list[Example]] | None


class Plans:
    """Plans of recipes. One is made at a time; the same settings are planned once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[str, Plain] = OrderedDict()
        self._planned = Kept()
        self._rows: OrderedDict[str, _Rows] = OrderedDict()

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
                self._kept[key] = self._plan(recipe)
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            found = self._kept[key]
        return {**found, **_verdict(found, recipe), "lr": recipe.train.lr}

    def _plan(self, recipe: Recipe) -> Plain:
        rows = self._encoded(recipe)
        if rows is not None:
            work = work_of(recipe, *rows)
        else:
            work = Work.of_rows(max(1, recipe.train.tokens_per_step // LENGTH), min(LENGTH, recipe.data.max_tokens))
        planner = Planner(recipe, work, IMPORTS_BYTES, kept=self._planned)
        if recipe.budget is None:
            return {"plan": planner.plan().plain(), "refused": None, "assumed": rows is None}
        try:
            return {"plan": fit(planner, recipe.budget.memory_gb)[1].plain(), "refused": None, "assumed": rows is None}
        except BudgetError as problem:
            return {"plan": None, "refused": str(problem), "assumed": rows is None}

    def _encoded(self, recipe: Recipe) -> _Rows:
        """The recipe's rows as tokens: they are read again when a file, the base or a setting of `data` changes."""
        key = json.dumps([recipe.base.path, recipe.plain()["data"], _stamps(recipe)], sort_keys=True)
        if key not in self._rows:
            for part, name in (("train", recipe.data.train), ("valid", recipe.data.valid)):
                if name and not os.path.isfile(name) and not hub.reads(name):
                    _refuse(f"data.{part}", name)
            self._rows[key] = encoded_rows(recipe)
            if len(self._rows) > KEPT_ROWS:
                self._rows.popitem(last=False)
        return self._rows[key]


def _refuse(field: str, name: str) -> None:
    """Say why a file that is none cannot be read."""
    try:
        read_rows(name)
    except DataError as problem:
        raise DataError(f"{field}: {problem}") from None


def _key(recipe: Recipe) -> str:
    plain = recipe.plain()
    plain["train"] = {k: v for k, v in plain["train"].items() if k not in _FREE}
    return json.dumps([plain, _stamps(recipe)], sort_keys=True)


def _stamps(recipe: Recipe) -> list[Any]:
    """When and how large the files of rows are; None where there is none."""
    found: list[tuple[int, int] | None] = []
    for name in (recipe.data.train, recipe.data.valid):
        try:
            now = os.stat(name) if name else None
        except (OSError, ValueError):
            now = None
        found.append(now and (now.st_mtime_ns, now.st_size))
    return found


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
