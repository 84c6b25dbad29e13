"""An adapter is trained again on a new base from the recipe and the rows that it carries, or an error says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.errors import DataError, RecipeError
from deltaw.train.readapt import stored_recipe
from train.tiny_runs import ROWS, VALID, recipe, run, save_base, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readapt")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "valid.jsonl", VALID)
    save_base(folder / "old")
    save_base(folder / "new", seed=5)
    return folder


@pytest.fixture
def old(files: Path, tmp_path: Path) -> Adapter:
    data = {"train": str(files / "rows.jsonl"), "valid": str(files / "valid.jsonl")}
    list(deltaw.train(recipe(files / "old", data=data, train={"steps": 3}), tmp_path / "old"))
    return deltaw.load_adapter(tmp_path / "old")


def test_train_readapt_is_the_same_recipe_on_the_new_base(old: Adapter, files: Path, tmp_path: Path) -> None:
    done = list(deltaw.readapt(old, files / "new", tmp_path / "again"))[-1]
    made = deltaw.load_adapter(done.adapter)
    model = deltaw.load_base(files / "new")
    model.attach(made)  # strict: it is this base's
    plain = {**old.provenance["recipe"], "base": {**old.provenance["recipe"]["base"], "path": str(files / "new")}}
    assert made.provenance["recipe"] == plain
    assert made.provenance["parents"] == [old.id]
    assert made.provenance["data_hash"] == old.provenance["data_hash"]
    list(deltaw.train(plain, tmp_path / "by_hand"))
    assert made.id == deltaw.load_adapter(tmp_path / "by_hand").id
    assert "parents" not in deltaw.load_adapter(tmp_path / "by_hand").provenance
    again = list(deltaw.readapt(tmp_path / "old", files / "new", tmp_path / "again"))
    assert [e.kind for e in again] == ["done"]


def test_train_readapt_needs_the_rows_that_were_learned(old: Adapter, files: Path, tmp_path: Path) -> None:
    rows, other = files / "rows.jsonl", tmp_path / "other.jsonl"
    text = rows.read_text()
    write_rows(other, ROWS[1:])
    try:
        rows.write_text(text.replace("yes", "yep", 1))
        with pytest.raises(DataError, match=r"rows\.jsonl is not what adapter \w+ learned .* or name it with --data"):
            stored_recipe(old, files / "new")
        assert stored_recipe(old, files / "new", data=rows).data.train == str(rows)
        rows.unlink()
        with pytest.raises(DataError, match=r"rows\.jsonl, are gone: give them, or others, with --data"):
            list(deltaw.readapt(old, files / "new", tmp_path / "again"))
        assert not (tmp_path / "again").exists()
        made = list(deltaw.readapt(old, files / "new", tmp_path / "again", data=other))[-1]
        assert deltaw.load_adapter(made.adapter).provenance["data_hash"] != old.provenance["data_hash"]
    finally:
        rows.write_text(text)


def test_train_readapt_says_what_an_adapter_lacks(old: Adapter, files: Path, tmp_path: Path) -> None:
    bare = Adapter(old.spec, old.sites, old.places)
    with pytest.raises(RecipeError, match="carries no recipe"):
        stored_recipe(bare, files / "new")
    odd = Adapter(old.spec, old.sites, provenance={"recipe": {**old.provenance["recipe"], "speed": 1}})
    with pytest.raises(RecipeError, match="carries does not load: recipe: unknown key 'speed'"):
        stored_recipe(odd, files / "new")
    run(recipe(files / "old", train={"steps": 1}), tmp_path / "memory")
    with pytest.raises(DataError, match="rows in memory: give them as a file"):
        stored_recipe(deltaw.load_adapter(tmp_path / "memory"), files / "new")
    valid = files / "valid.jsonl"
    valid.rename(files / "moved.jsonl")
    try:
        with pytest.raises(DataError, match=r"valid\.jsonl, are gone: give --valid"):
            stored_recipe(old, files / "new")
        assert stored_recipe(old, files / "new", valid=files / "moved.jsonl").data.valid.endswith("moved.jsonl")
    finally:
        (files / "moved.jsonl").rename(valid)
