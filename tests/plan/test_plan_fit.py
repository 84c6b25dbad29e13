"""What fits in so much memory, and what a run with a budget does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from deltaw.errors import BadInput, BudgetError, RecipeError
from deltaw.plan.kept import Kept
from deltaw.plan.network import shapes
from deltaw.train.fitting import fit, work_of_rows
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from train.tiny_runs import ROWS, recipe, run, save_base


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> Path:
    """Four layers of SmolLM2-360M: a config and no weights."""
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(shapes()["smollm2-360m"] | {"num_hidden_layers": 4}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("plan") / "tiny")


def planner(folder: Path, base: dict | None = None, **train) -> Planner:
    base = {"path": str(folder), "dtype": "bfloat16", **(base or {})}
    made = Planner(load_recipe({"base": base, "adapter": {"method": "lora"}, "train": train}), Work.of_rows(4, 256))
    made.runtime = 400_000_000
    return made


def test_what_costs_least_is_given_up_first(shape):
    made = planner(shape)
    whole = made.plan().needed_bytes / 1e9
    chosen, plan = fit(made, whole + 0.01)
    assert (chosen, plan.gave_up) == (made.recipe, ())
    chosen, plan = fit(made, whole - 0.02)
    assert chosen.train.micro_tokens == 512
    assert not chosen.train.checkpointing
    assert plan.needed_bytes <= (whole - 0.02) * 1e9
    assert "512 tokens" in plan.gave_up[0]
    smallest = made.plan(chosen.model_copy(update={"train": chosen.train.model_copy(update={"micro_tokens": 256})}))
    chosen, plan = fit(made, smallest.needed_bytes / 1e9 - 0.001)  # attention keeps no scores: little is left to save
    assert chosen.train.checkpointing
    assert chosen.base.format == "dense"


def test_what_the_recipe_fixes_is_not_changed(shape):
    made = planner(shape, {"format": "dense"}, micro_tokens=1024, checkpointing=False)
    with pytest.raises(BudgetError, match="smallest budget that would is"):
        fit(made, 0.6)


def test_the_smallest_budget_that_is_named_does(shape):
    made = planner(shape)
    with pytest.raises(BudgetError) as said:
        fit(made, 0.2)
    named = float(str(said.value).split("would is ")[1].split(" GB")[0])
    _, plan = fit(made, named)
    assert plan.needed_bytes <= named * 1e9
    with pytest.raises(BudgetError):
        fit(made, named - 0.02)


def test_a_run_with_a_budget_says_and_keeps_what_it_chose(base, tmp_path):
    plain = recipe(base, train={"steps": 3})
    plain["budget"] = {"memory_gb": 64}
    events = run(plain, tmp_path / "run", rows=ROWS)
    planned = next(e for e in events if e.kind == "planned")
    assert planned.needed_bytes < 64e9
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert kept["chosen"]["budget"] == {"memory_gb": 64}
    again = run(plain, tmp_path / "run", rows=ROWS)  # done already: the same choice, the same run
    assert again[-1].kind == "done"


def test_a_budget_that_nothing_fits_is_bad_input(base, tmp_path):
    plain = recipe(base, train={"steps": 3})
    plain["budget"] = {"memory_gb": 0.01}
    with pytest.raises(BudgetError, match="smallest"):
        run(plain, tmp_path / "run", rows=ROWS)
    with pytest.raises(RecipeError, match="above 0"):
        load_recipe({**plain, "budget": {"memory_gb": -1}})


def test_a_common_beginning_is_planned_once(shape):
    """Eight rows of 256 tokens, 200 of them alike: as many rows are computed as by 7 rows of 56 and one of 256."""
    recipe_ = load_recipe({"base": {"path": str(shape), "dtype": "bfloat16"}, "adapter": {"method": "lora"}})
    apart = Work.of_rows(8, 256, 0.1)
    less = Work([(56, 25)] * 7 + [(256, 25)])

    kept = Kept()  # what planners share tells such works apart

    def activations(work: Work) -> int:
        return Planner(recipe_, work, kept=kept).plan().moments["step"]["activations"]

    alike = activations(replace(apart, common=200))
    assert alike < 0.45 * activations(apart)
    assert alike == pytest.approx(activations(less), rel=0.02)


def test_what_rows_begin_with_is_found_in_a_file(base, tmp_path):
    told = [row | {"prompt": "Say yes or no to this: " + row["prompt"]} for row in ROWS]
    for rows, common in ((told, len("Say yes or no to this: ")), (ROWS, 0)):
        file = tmp_path / f"{common}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"base": {"path": str(base)}, "adapter": {"method": "lora"}, "data": {"train": str(file)}}
        work = work_of_rows(load_recipe(settings))
        assert work is not None
        assert work.common == common


@pytest.mark.parametrize("budget", [float("nan"), float("inf"), 0.0, -1.0])
def test_plan_fit_a_budget_is_a_number_above_zero(budget):
    recipe = load_recipe({"base": {"path": "smollm2-135m"}, "adapter": {"method": "lora"}})
    with pytest.raises(BadInput, match="a finite number above 0"):
        fit(Planner(recipe, Work.of_rows(1, 8)), budget)
