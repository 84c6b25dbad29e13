"""`deltaw plan` from the command line, and real steps beside the plan."""

from __future__ import annotations

import json

import pytest

from deltaw.errors import BadInput, BaseError
from deltaw.plan import memory
from deltaw.train.measure import compared, measured
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from train.tiny_runs import save_base


def call(capsys, *words: str) -> dict:
    from typer.testing import CliRunner

    from deltaw.cli.main import app

    done = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output) if "--json" in words else {"text": done.output}


def test_qlora_is_lora_over_nf4_with_double_quantisation(capsys):
    words = ["--base", "7B", "--method", "qlora", "--rank", "8", "--batch", "1", "--length", "16", "--json"]
    plain = call(capsys, *words)
    assert plain["trainable"] == 19_988_480
    assert (plain["settings"]["format"], plain["settings"]["double_quant"]) == ("nf4", True)
    assert list(plain["bytes"])[:9] == [
        "weights", "constants", "adapter", "gradients", "optimizer", "activations", "logits", "workspace", "allocator"
    ]  # fmt: skip


def test_the_table_names_every_cause(capsys):
    text = call(capsys, "--base", "gpt2", "--batch", "1", "--length", "16", "--rules")["text"]
    assert all(word in text for word in ("activations", "logits", "runtime", "rules of thumb", "16 P_lora"))


def test_a_recipe_or_a_base_but_not_both(capsys):
    with pytest.raises(BadInput, match="one of the two"):
        call(capsys, "--json")


@pytest.mark.skipif(memory.resident_bytes() is None, reason="needs /proc")
def test_real_steps_stand_beside_the_plan(tmp_path):
    folder = save_base(tmp_path / "tiny")
    recipe = load_recipe({"base": {"path": str(folder), "dtype": "float32"}, "adapter": {"method": "lora", "rank": 3}})
    planner = Planner(recipe, Work.of_rows(2, 16))
    found = measured(planner, recipe, steps=2)
    assert found["start"] < found["loaded"] <= found["peak"]
    errors = compared(planner.plan(), found)
    assert set(errors) >= {"peak", "loaded"}
    with pytest.raises(BaseError, match="without weights"):
        measured(Planner(load_recipe({"base": "7B", "adapter": {}}), Work.of_rows(1, 4)), recipe)
