"""Recipes, data sets and what goes into the wheel."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

from house_walk import ROOT, SRC, shown, tracked_files

from deltaw.data.source import read_rows
from deltaw.train.recipe import load_recipe

RECIPES = sorted((ROOT / "recipes").glob("**/*.yaml"))
DATA = sorted(p for p in (ROOT / "data").iterdir() if p.is_dir())
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_recipe_loads_and_begins_with_the_command_that_runs_it():
    assert len(RECIPES) >= 2
    assert len(RECIPES) == len([p for p in (ROOT / "recipes").rglob("*") if p.is_file()])
    for path in RECIPES:
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first == f"# deltaw train {shown(path)} --out runs/{path.stem}", shown(path)
        recipe = load_recipe(path)
        for rows in (recipe.data.train, recipe.data.valid):
            assert rows is None or Path(rows).is_file(), f"{shown(path)} names {rows}"
        assert load_recipe(recipe.plain()) == recipe


def test_every_data_set_has_its_licence_and_source():
    assert len(DATA) >= 2
    assert len(DATA) == len(list((ROOT / "data").iterdir())), "a file lies beside the data sets"
    for folder in DATA:
        text = (folder / "LICENSE.txt").read_text(encoding="utf-8")
        for word in ("Source:", "Licence:", "Changes:"):
            assert re.search(rf"^{word} +\S", text, re.MULTILINE), f"{shown(folder)}/LICENSE.txt has no {word}"
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        assert f"{shown(folder)}/LICENSE.txt" in readme


def test_every_data_file_reads_and_no_test_row_is_trained_on():
    walked = 0
    for folder in DATA:
        rows = {p.stem: read_rows(p) for p in sorted(folder.glob("*.jsonl"))}
        if folder.name == "ppl":  # texts to measure perplexity on
            assert all(row.prompt == "" and row.completion for text in rows.values() for row in text)
            continue
        if folder.name == "general_mcq":  # questions to measure forgetting on
            assert all(row.completion in row.choices for part in rows.values() for row in part)
            continue
        assert set(rows) == {"train", "valid", "test"}, shown(folder)
        seen = {row.prompt for row in rows["train"]} | {row.prompt for row in rows["valid"]}
        assert not [row.where for row in rows["test"] if row.prompt in seen]
        if (folder / "labels.json").is_file():
            labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
            assert {row.completion for part in rows.values() for row in part} == set(labels)
        walked += sum(map(len, rows.values()))
    assert walked > 5000


def test_the_wheel_holds_the_package_and_no_data():
    built = CONFIG["tool"]["hatch"]["build"]["targets"]
    assert built["wheel"] == {"packages": ["src/deltaw"]}
    assert not {"data", "recipes", "bench"} & set(built["sdist"]["include"])
    inside = [p for p in tracked_files() if p.is_relative_to(SRC)]
    assert len(inside) > 40
    page = [p for p in inside if p.is_relative_to(SRC / "lab" / "assets")]
    vendored = [p for p in page if p.is_relative_to(SRC / "lab" / "assets" / "vendor")]
    assert {p.suffix for p in inside if p not in page} <= {".py", ".txt", ".typed", ".cpp", ".json", ".h"}
    assert {p.suffix for p in page if p not in vendored} == {".html", ".css", ".js", ".svg"}
    assert sorted(p.name for p in vendored) == ["LICENSE", "LICENSE", "d3.min.js", "plot.umd.min.js"]
    assert sum(p.stat().st_size for p in vendored) < 600_000
    assert [shown(p) for p in inside if p.suffix == ".txt"] == ["src/deltaw/merge/probe.txt"]
    assert max(p.stat().st_size for p in inside if p not in vendored) < 50_000


def test_torch_is_pinned_for_set_ups_and_ranged_for_users():
    pins = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    ranges = [d for d in CONFIG["project"]["dependencies"] if d.startswith("torch>")]
    assert len(pins) == 1
    assert len(ranges) == 1
    assert "==" not in ranges[0]
