"""The program in this process: its exit code, stdout and stderr."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import yaml
from ended import Call, Ended

from deltaw.core.fingerprint import set_cache_dir
from train.tiny_runs import ROWS, VALID, recipe, run, save_base, write_rows


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("cache")
    set_cache_dir(folder)
    yield folder
    set_cache_dir(None)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that knows some of ROWS."""
    out = tmp_path_factory.mktemp("trained") / "run"
    run(recipe(base, train={"steps": 40}, adapter={"rank": 8, "alpha": 16}), out, rows=ROWS[:6])
    return out


@pytest.fixture
def written(base: Path, tmp_path: Path) -> Path:
    """A recipe file beside its rows."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "valid.jsonl", VALID)
    plain = recipe(base, data={"train": "rows.jsonl", "valid": "valid.jsonl"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    return tmp_path / "recipe.yaml"


@pytest.fixture
def deltaw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """deltaw("eval", "--base", folder, ...) as from a terminal, without the seconds of a new process."""
    from deltaw.cli.main import main
    from deltaw.model.identity import OtherBaseWarning

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["deltaw", *map(str, arguments)])
        capfd.readouterr()
        with warnings.catch_warnings():  # which puts back the showwarning that main sets
            warnings.simplefilter("always", OtherBaseWarning)
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capfd.readouterr()
        code = ended.value.code
        return Ended(0 if code is None else int(code), out, err)

    return call
