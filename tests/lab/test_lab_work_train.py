"""The form of a recipe, files of rows, and the plan that follows what is composed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.core.spec import MethodSpec
from deltaw.lab import plans, rows
from deltaw.lab.desk import desk_in
from deltaw.lab.forms import blamed, described, recipe_form
from deltaw.lab.server import make_app
from deltaw.methods import METHODS
from deltaw.plan.memory import machine_bytes
from deltaw.train.fitting import work_of_rows
from deltaw.train.planning import IMPORTS_BYTES, Planner
from deltaw.train.recipe import Recipe, load_recipe

HERE = "http://127.0.0.1:8765"
ROW = json.dumps({"prompt": "a?", "completion": "yes"})


class Form:
    """A client of the form, and where files of rows are kept."""

    def __init__(self, tiny: Bench, folder: Path, base: Path) -> None:
        self.desk = desk_in(folder / "runs")
        self.base = str(base)
        self.client = TestClient(make_app(tiny.lab, desk=self.desk), base_url=HERE, headers={"origin": HERE})

    def give(self, name: str, text: str) -> Any:
        return self.client.post("/api/work/data", json={"name": name, "text": text})

    def plan(self, recipe: dict[str, Any]) -> Any:
        return self.client.post("/api/work/train/plan", json={"recipe": recipe})

    def recipe(self, **adapter: Any) -> dict[str, Any]:
        return {"base": {"path": self.base}, "adapter": {"method": "lora", **adapter}}


@pytest.fixture
def form(tiny: Bench, tiny_folder: Path, tmp_path: Path) -> Form:
    return Form(tiny, tmp_path, tiny_folder)


def leaves(model: Any, path: str = "") -> set[str]:
    """Every setting of a recipe but the adapter's, by its dotted path, as pydantic has them."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        if path == "" and name == "adapter":
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((k for k in kinds if isinstance(k, type) and hasattr(k, "model_fields")), None)
        found |= leaves(inner, f"{path}{name}.") if inner else {f"{path}{name}"}
    return found


def test_lab_work_the_form_has_every_setting_of_the_recipe_and_of_every_method(form: Form):
    found = form.client.get("/api/work/train/form").json()
    fields = [f for part in found["sections"] for f in part["fields"]]
    assert {f["path"] for f in fields} == leaves(Recipe)
    assert [m["name"] for m in found["methods"]] == [m.name for m in METHODS]
    for model, shown in zip(METHODS, found["methods"], strict=True):
        every = [*shown["fields"], *shown["shared"]]
        assert {f["name"] for f in every} == set(model.model_fields) - {"method"}
        assert {f["name"] for f in shown["shared"]} == set(MethodSpec.model_fields) - {"method"}
        for f in every:
            default = model.model_fields[f["name"]].default
            assert json.dumps(f["default"]) == json.dumps(default), (model.name, f["name"])
            fields.append(f)
    assert len(fields) > 120
    for f in fields:
        assert len(f["about"]) > 8, f"{f['path']} is not described in its docstring"
        assert f["kind"] in ("choice", "switch", "whole", "number", "text", "names", "list", "map")
        assert f["kind"] != "choice" or f["default"] in f["options"]


def test_lab_work_fields_have_the_ranges_and_choices_of_the_schemas():
    found = recipe_form()
    fields = {f["path"]: f for part in found["sections"] for f in part["fields"]}
    lora = {f["name"]: f for f in found["methods"][0]["fields"]}
    assert fields["base.format"]["options"] == ["dense", "nf4", "fp4", "int4", "int8"]
    assert fields["data.max_tokens"]["min"] == 2
    assert fields["train.optimizer.name"]["options"] == ["adamw", "lora_plus", "galore"]
    assert (fields["base.path"]["required"], fields["train.steps"]["nullable"]) == (True, True)
    assert lora["rank"]["min"] == 1
    assert (lora["dropout"]["min"], lora["dropout"]["below"]) == (0, 1)
    assert lora["rank_pattern"]["kind"] == "map"
    assert found["methods"][0]["shared"][0]["kind"] == "names"


def test_lab_work_a_docstrings_entries_may_be_shared_and_may_go_on():
    class Made(MethodSpec):
        """Settings.

        rank, alpha   of both
        other         begins here, and
                      goes on, with `code`
        elsewhere     is no field

        rank  is said once
        """

        rank: int = 1
        alpha: int = 2
        other: int = 3

    found = described(Made)
    assert found["alpha"] == "of both"
    assert found["rank"] == "is said once"
    assert found["other"] == "begins here, and goes on, with code"
    assert found["targets"].startswith('"all-linear"')
    assert "elsewhere" not in found


@pytest.mark.parametrize(
    ("sentence", "wanted"),
    [
        ("recipe: adapter: Lora.rank: must be at least 1 (got 0).", ["adapter.rank"]),
        ("recipe: train: lr must be a finite number above 0, not -1.0 (got {}).", ["train.lr"]),
        ("recipe: data.max_tokens: Input should be greater than or equal to 2 (got 1).", ["data.max_tokens"]),
        ("recipe: train.optimizer is galore, and adapter.method is 'lora': name: adamw", []),
        ("Nothing here is a setting.", []),
    ],
)
def test_lab_work_a_sentence_is_shown_at_the_field_it_is_about(sentence: str, wanted: list[str]):
    paths = ["adapter.rank", "adapter.alpha", "train.lr", "train.optimizer.rank", "data.max_tokens", "base.path"]
    assert blamed(sentence, paths) == wanted


def test_lab_work_rows_are_kept_whole_and_counted(form: Form):
    assert form.client.get("/api/work/data").json()["files"] == []
    assert not form.desk.data.exists()
    given = form.give("rows.jsonl", f"{ROW}\n\n{ROW}\n")
    assert given.status_code == 200, given.text
    path = form.desk.data / "rows.jsonl"
    assert given.json() == {
        "name": "rows.jsonl",
        "path": str(path),
        "rows": 2,
        "bytes": path.stat().st_size,
        "shown": [json.loads(ROW)] * 2,
    }
    assert path.read_text() == f"{ROW}\n\n{ROW}\n"
    assert form.give("rows.jsonl", f"{ROW}\n\n{ROW}\n").status_code == 200, "the same again"
    other = form.give("rows.jsonl", ROW)
    assert other.status_code == 422
    assert "another 'rows.jsonl' already" in other.json()["detail"]
    assert [f["rows"] for f in form.client.get("/api/work/data").json()["files"]] == [2]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "completion": "b"', "rows.jsonl line 412: bad JSON"),
        ('{"prompt": "a"}', "rows.jsonl line 412: field 'completion' is missing"),
        ("[1]", "rows.jsonl line 412: a row must be an object"),
        ('{"prompt": "a", "completion": "\\ud800"}', "rows.jsonl line 412: field 'completion' holds a lone surrogate"),
    ],
)
def test_lab_work_a_bad_line_of_rows_is_named_and_nothing_is_kept(form: Form, line: str, said: str):
    lines = [ROW] * 500
    lines[411] = line
    answer = form.give("rows.jsonl", "\n".join(lines))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(said)
    assert list(form.desk.data.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../rows.jsonl", "a/b.jsonl", "..jsonl", ".jsonl", "rows.txt", "", "C:\\rows.jsonl", "rows.jsonl\n", "a b.jsonl"],
)
def test_lab_work_rows_cannot_be_written_elsewhere(form: Form, name: str):
    answer = form.give(name, ROW)
    assert answer.status_code == 422
    assert "cannot be called" in answer.json()["detail"]
    assert not form.desk.runs.exists()


def test_lab_work_too_many_bytes_and_no_json_are_refused(form: Form, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("deltaw.lab.work_train.MOST_BYTES", 1000)
    assert form.give("rows.jsonl", f"{ROW}\n" * 10).status_code == 200
    for n in (50, 5000):
        answer = form.give("more.jsonl", f"{ROW}\n" * n)
        assert answer.status_code == 422
        assert "larger than" in answer.json()["detail"]
    for body in ("{", "[]", '{"name": "x.jsonl"}', '{"name": 1, "text": ""}'):
        headers = {"content-type": "application/json"}
        assert form.client.post("/api/work/data", content=body, headers=headers).status_code == 422, body
    assert rows.MOST_BYTES == 64_000_000


def test_lab_work_the_plan_is_the_planners_and_the_yaml_is_the_recipe(form: Form, tmp_path: Path):
    form.give("rows.jsonl", "".join(json.dumps({"prompt": "ab" * n, "completion": "yes"}) + "\n" for n in range(1, 9)))
    recipe = form.recipe(rank=3) | {"data": {"train": str(form.desk.data / "rows.jsonl")}}
    found = form.plan(recipe).json()
    loaded = load_recipe(recipe)
    work = work_of_rows(loaded)
    assert work is not None
    assert found["plan"] == json.loads(json.dumps(Planner(loaded, work, IMPORTS_BYTES).plan().plain()))
    assert found["assumed"] is False
    assert found["lr"] == loaded.train.lr
    (tmp_path / "again.yaml").write_text(found["yaml"])
    assert yaml.safe_load(found["yaml"]) == recipe
    assert load_recipe(tmp_path / "again.yaml") == loaded
    machine = machine_bytes()
    assert machine is not None
    assert found["fits"] == (found["plan"]["needed_bytes"] <= machine[1])
    assert "are needed" in found["why"]
    more = form.plan(form.recipe(rank=6)).json()
    assert more["assumed"] is True
    assert more["plan"]["trainable"] == 2 * found["plan"]["trainable"]


def test_lab_work_a_plan_is_made_once_and_learning_rates_need_no_new_one(form: Form, monkeypatch: pytest.MonkeyPatch):
    made = []
    real = plans.Plans._plan
    monkeypatch.setattr(plans.Plans, "_plan", lambda self, recipe: made.append(1) or real(self, recipe))
    recipe = form.recipe(rank=2)
    first = form.plan(recipe).json()
    second = form.plan(recipe | {"train": {"lr": 0.5, "schedule": "constant"}}).json()
    assert (second["lr"], second["plan"]) == (0.5, first["plan"])
    assert len(made) == 1
    form.plan(recipe | {"train": {"checkpointing": True}})
    assert len(made) == 2


def test_lab_work_rows_are_read_once_until_their_file_changes(
    form: Form, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    real = plans.encoded_rows
    monkeypatch.setattr(plans, "encoded_rows", lambda recipe: read.append(1) or real(recipe))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a?", "completion": "yes"}\n' * 3)
    recipe = form.recipe() | {"data": {"train": str(rows)}}
    first = form.plan(recipe).json()
    other = form.plan(recipe | {"adapter": {"method": "lora", "rank": 5}}).json()
    assert (first["assumed"], other["assumed"], len(read)) == (False, False, 1)
    assert other["plan"]["settings"]["length"] == first["plan"]["settings"]["length"]
    rows.write_text('{"prompt": "what is it?", "completion": "a longer row"}\n' * 3)
    longer = form.plan(recipe).json()
    assert len(read) == 2
    assert longer["plan"]["settings"]["length"] > first["plan"]["settings"]["length"]


def test_lab_work_what_does_not_fit_says_why(form: Form, monkeypatch: pytest.MonkeyPatch):
    small = form.plan(form.recipe() | {"budget": {"memory_gb": 0.01}}).json()
    assert (small["fits"], small["plan"]) == (False, None)
    assert "smallest budget" in small["why"]
    monkeypatch.setattr(plans, "machine_bytes", lambda: (10**9, 10**6))
    here = form.plan(form.recipe()).json()
    assert here["fits"] is False
    assert "0.0 GB of this machine's 1.0 GB are free" in here["why"]
    assert "Most of it is runtime" in here["why"]


@pytest.mark.parametrize(
    ("change", "said", "fields"),
    [
        ({"adapter": {"method": "lora", "rank": 0}}, "Lora.rank: must be at least 1", ["adapter.rank"]),
        ({"train": {"lr": "fast"}}, "train.lr: Input should be a valid number", ["train.lr"]),
        ({"train": {"optimizer": {"name": "galore"}}}, "Use method: full, or name: adamw", []),
        ({"adapter": {"method": "lora", "targets": "q_porj"}}, "q_porj", []),
        (
            {"data": {"train": "absent.jsonl"}},
            "data.train: the data file 'absent.jsonl' does not exist",
            ["data.train"],
        ),
        ({"base": {}}, "'base.path' is missing", ["base.path"]),
        ({"adapter": {"method": "lorra"}}, "Did you mean 'lora'", []),
    ],
)
def test_lab_work_a_setting_that_cannot_be_says_so_at_its_field(
    form: Form, change: dict[str, Any], said: str, fields: list[str]
):
    answer = form.plan(form.recipe() | change)
    assert answer.status_code == 422, answer.text
    assert said in answer.json()["detail"]
    assert set(fields) <= set(answer.json()["fields"])
    assert yaml.safe_load(answer.json()["yaml"]) == form.recipe() | change
