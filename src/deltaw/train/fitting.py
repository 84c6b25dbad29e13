"""What fits in so much memory: settings are changed in the order that costs a user least, and it is said what was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from typing import Any

from deltaw.data.needed import common_rows
from deltaw.data.source import read_rows
from deltaw.data.task import given_labels
from deltaw.data.template import Example, encode_all
from deltaw.errors import BadInput, BudgetError
from deltaw.model.base import task_before
from deltaw.model.load import load_tokenizer
from deltaw.plan.network import find_config
from deltaw.plan.plan import Plan
from deltaw.store.files import write_text
from deltaw.train.events import Planned
from deltaw.train.planning import EVALUATED_TOKENS, Planner, Work
from deltaw.train.recipe import Recipe
from deltaw.train.schedule import Schedule

FILE = "plan.json"
_LOOKED_AT = 2000  # steps among which the heaviest is sought
_FORMATS: tuple[dict[str, Any], ...] = ({"format": "int8"}, {"format": "nf4"}, {"format": "nf4", "double_quant": True})


@dataclass(frozen=True)
class _Option:
    """One way to run, and what it gives up beside the recipe."""

    recipe: Recipe
    gave_up: tuple[str, ...]


def fit(planner: Planner, memory_gb: float) -> tuple[Recipe, Plan]:
    """The first way to run the planner's recipe that fits, and its plan, which says what was given up.

    Tried in this order: smaller micro-batches, checkpointing, linear maps in int8, nf4, nf4 with double quantisation,
    paged optimizer states. What the recipe sets itself (`base.format`, `train.micro_tokens`, `train.checkpointing`,
    `train.optimizer.paged`) is never changed.

    Raises BudgetError that names the smallest budget that would do, BadInput for a budget that is no number above 0.
    """
    if not (math.isfinite(memory_gb) and memory_gb > 0):
        raise BadInput(f"a budget of {memory_gb} GB: it must be a finite number above 0.")
    limit = memory_gb * 1e9
    smallest: Plan | None = None
    for option in _coarse(planner.recipe, planner):
        micros = list(_micro(option, planner))
        least = planner.plan(micros[-1].recipe)
        if smallest is None or least.needed_bytes < smallest.needed_bytes:
            smallest = replace(least, gave_up=micros[-1].gave_up)
        if least.needed_bytes > limit:
            continue
        for one in micros:
            plan = planner.plan(one.recipe)
            if plan.needed_bytes <= limit:
                return one.recipe, replace(plan, gave_up=one.gave_up)
    assert smallest is not None
    said = "; ".join(smallest.gave_up) or "as it is"
    needed = -(-smallest.needed_bytes // 10_000_000) / 100
    raise BudgetError(
        f"nothing that this recipe allows fits in {memory_gb:g} GB. The smallest budget that would is {needed:.2f} GB "
        f"({said}).\n  Shorter rows, fewer targets, a lower rank or a smaller base need less; settings that the recipe "
        "fixes (format, micro_tokens, checkpointing) are not changed."
    )


def _coarse(recipe: Recipe, planner: Planner) -> Iterator[_Option]:
    """Optimizer, format and checkpointing, the first in the outermost loop; micro-batches as asked."""
    optimizers = [_Option(recipe, ())]
    if "paged" not in recipe.train.optimizer.model_fields_set:
        optimizer = recipe.train.optimizer.model_copy(update={"paged": True})
        why = "optimizer states are kept in a file, in pages: slower steps, the same result"
        optimizers.append(_Option(_trained(recipe, optimizer=optimizer), (why,)))
    free_format = "format" not in recipe.base.model_fields_set and not recipe.adapter.trains_base
    for asked in optimizers:
        formats = [asked]
        if free_format and planner.base_of(recipe).format == "dense":
            formats += [_in_format(asked, change, planner.base_of(recipe).dtype) for change in _FORMATS]
        for one in formats:
            yield one
            if "checkpointing" not in recipe.train.model_fields_set:
                why = "activations are computed again in the backward: about a third more time, the same result"
                yield _Option(_trained(one.recipe, checkpointing=True), (*one.gave_up, why))


def _in_format(option: _Option, change: dict[str, Any], dtype: str) -> _Option:
    base = option.recipe.base.model_copy(update=change)
    name = base.format + (" with double quantisation" if base.double_quant else "")
    why = f"linear maps are kept in {name} instead of {dtype}: the base answers a little differently"
    return _Option(option.recipe.model_copy(update={"base": base}), (*option.gave_up, why))


def _micro(option: _Option, planner: Planner) -> Iterator[_Option]:
    """Whole steps first, then half as many tokens at a time, down to single documents."""
    yield option
    if "micro_tokens" in option.recipe.train.model_fields_set:
        return
    longest, tokens = max(n for n, _ in planner.work.step), sum(n for n, _ in planner.work.step)
    while tokens > longest:
        tokens = max(longest, tokens // 2)
        why = f"{tokens} tokens are computed at a time instead of a whole step: a little slower, the same result"
        yield _Option(_trained(option.recipe, micro_tokens=tokens), (*option.gave_up, why))


def _trained(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


# For a run --------------------------------------------------------------------------------------------


def work_of(recipe: Recipe, examples: Sequence[Example], valid: Sequence[Example] = ()) -> Work:
    """The heaviest optimizer step of a run on `examples`, and the largest pack of an evaluation on `valid`."""
    schedule = Schedule([len(e.input_ids) for e in examples], recipe.train)

    def weight(rows: Sequence[int]) -> int:
        return sum(len(examples[i].input_ids) + examples[i].n_targets for i in rows)

    heaviest = max((schedule.rows(step) for step in range(min(schedule.n_steps, _LOOKED_AT))), key=weight)
    pack: list[tuple[int, int]] = []
    for e in sorted(valid, key=lambda e: -len(e.input_ids)):
        if pack and sum(n for n, _ in pack) + len(e.input_ids) > EVALUATED_TOKENS:
            break
        pack.append((len(e.input_ids), e.n_targets))
    step = [examples[i] for i in heaviest]
    return Work([(len(e.input_ids), e.n_targets) for e in step], pack, common_rows(step))


def work_of_rows(recipe: Recipe) -> Work | None:
    """The same for the recipe's own files of rows; None where rows or tokenizer are not there.

    Raises DataError, BaseError as training would.
    """
    rows = encoded_rows(recipe)
    return None if rows is None else work_of(recipe, *rows)


def encoded_rows(recipe: Recipe) -> tuple[list[Example], list[Example]] | None:
    """The recipe's own rows to train on and to evaluate, as tokens; None, and raises, as `work_of_rows`."""
    folder = find_config(recipe.base.path)[1]
    if folder is None or recipe.data.train is None or not isfile(recipe.data.train):
        return None
    tokenizer = load_tokenizer(folder)
    task = task_before(folder, given_labels(recipe.data))

    def encoded(path: str) -> list[Example]:
        return encode_all(read_rows(path), tokenizer, recipe.data, task).examples

    return encoded(recipe.data.train), encoded(recipe.data.valid) if recipe.data.valid else []


def chosen_before(out: Path, recipe: Recipe) -> Recipe | None:
    """What was chosen for this recipe when the run in `out` began, so that it goes on with the same settings."""
    path = out / FILE
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Recipe(**kept["chosen"]) if kept["asked"] == recipe.plain() else None
    except (ValueError, KeyError, TypeError):
        return None  # damaged: chosen anew


def keep_choice(out: Path, asked: Recipe, chosen: Recipe, plan: Plan) -> None:
    """Write RUN/plan.json: the recipe as asked and as chosen, and the plan."""
    kept = {"asked": asked.plain(), "chosen": chosen.plain(), "plan": plan.plain()}
    write_text(out / FILE, json.dumps(kept))


def planned_event(memory_gb: float, plan: Plan) -> Planned:
    """What a run says of its choice."""
    return Planned(memory_gb, plan.needed_bytes, plan.settings, plan.gave_up)
