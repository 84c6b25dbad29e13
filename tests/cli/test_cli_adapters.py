"""`deltaw adapters` and references to adapters in other commands, as from a terminal."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from ended import Call, refused

from deltaw.cli.references import set_registry
from deltaw.store.peft import read_adapter, write_adapter
from train.tiny_runs import ROWS, save_base, write_rows


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The registry's folder, named by the environment as a user's would be."""
    monkeypatch.setenv("DELTAW_REGISTRY", str(tmp_path / "registry"))
    yield tmp_path / "registry"
    set_registry(None, None)


@pytest.fixture
def second(trained: Path, tmp_path: Path) -> Path:
    """Another adapter of the same base."""
    adapter = read_adapter(trained)
    half = {site: {name: tensor / 2 for name, tensor in params.items()} for site, params in adapter.sites.items()}
    return write_adapter(replace(adapter, sites=half), tmp_path / "second")


def test_cli_adapters_the_life_of_an_adapter(
    deltaw: Call, folder: Path, trained: Path, second: Path, tmp_path: Path
) -> None:
    made = deltaw("adapters", "add", "yes-no", trained, "--json")
    assert (made.code, made.json["version"], made.json["labels"]) == (0, 1, ["current"])
    assert deltaw("adapters", "add", "yes-no", trained).out.startswith("yes-no@1 (current) was already")
    later = deltaw("adapters", "add", "yes-no", second, "--json").json
    assert (later["version"], later["labels"]) == (2, ["candidate"])
    (row,) = deltaw("adapters", "list", "--json").json["adapters"]
    assert (row["name"], row["labels"], row["method"]) == ("yes-no", {"current": 1, "candidate": 2}, "lora")
    assert {"yes-no", "candidate@2", "current@1", "lora"} <= set(deltaw("adapters", "list").out.split())
    shown = deltaw("adapters", "show", "yes-no@2", "--json").json
    assert shown["recipe"]["adapter"]["rank"] == 8
    assert shown["date"][:2] == "20"
    assert "history" in deltaw("adapters", "show", "yes-no").out
    assert deltaw("adapters", "diff", "yes-no", "yes-no@2", "--json").json["tensors"]["changed"] > 0
    assert "largest_change" in deltaw("adapters", "diff", "yes-no", "yes-no@2").out
    assert deltaw("adapters", "promote", "yes-no@2").out == "yes-no@current is version 2 (was 1)\n"
    assert deltaw("adapters", "rollback", "yes-no", "--json").json["version"] == 1
    refused(deltaw("adapters", "remove", "yes-no@2"), "RegistryError", "yes-no@2 is candidate", "--label candidate")
    assert deltaw("adapters", "remove", "yes-no", "--label", "candidate").code == 0
    assert deltaw("adapters", "remove", "yes-no@2").out.startswith("removed yes-no@2")
    assert deltaw("adapters", "gc", "--json").json["deleted"] == []  # this process has read it
    assert deltaw("adapters", "push", "yes-no", tmp_path / "out", "--json").json["id"] == made.json["id"]
    pulled = deltaw("adapters", "pull", "copy", tmp_path / "out", "--registry", tmp_path / "other", "--json").json
    assert (pulled["id"], pulled["version"]) == (made.json["id"], 1)
    assert deltaw("adapters", "verify", "--registry", tmp_path / "other").out == "sound: 1 adapters checked\n"


def test_cli_adapters_a_gate_decides(deltaw: Call, folder: Path, trained: Path, second: Path, tmp_path: Path) -> None:
    for path in (trained, second):
        deltaw("adapters", "add", "yes-no", path)
    (tmp_path / "score.py").write_text("import sys\nprint('{\"value\": %d}' % sys.argv[1].endswith(sys.argv[2]))")
    good = read_adapter(second).id
    gate = ("--gate", f"{sys.executable} {tmp_path}/score.py {{adapter}} {good}")
    for limit in (("--gate-min-value", "2"), ("--gate-min-gain", "1.5")):
        ended = deltaw("adapters", "promote", "yes-no@2", *gate, *limit, "--json")
        refused(ended, "WorkFailed", "The gate is not passed: yes-no@2 has 1", code=1)
    passed = deltaw("adapters", "promote", "yes-no@2", *gate, "--gate-min-value", "1", "--json").json
    assert (passed["changed"], passed["gate"]["value"], passed["gate"]["passed"]) == (True, 1.0, True)
    assert [g["passed"] for g in deltaw("adapters", "show", "yes-no@2", "--json").json["gates"]] == [False, False, True]
    refused(deltaw("adapters", "promote", "yes-no@1", "--gate-min-gain", "1"), "RegistryError", "add --gate")


def test_cli_adapters_what_is_damaged_is_exit_1_and_never_used(
    deltaw: Call, folder: Path, trained: Path, base: Path, tmp_path: Path
) -> None:
    deltaw("adapters", "add", "yes-no", trained)
    file = next(folder.glob("objects/*/*/adapter_model.safetensors"))
    data = bytearray(file.read_bytes())
    data[-7] ^= 16
    file.chmod(0o644)
    file.write_bytes(data)
    ended = deltaw("adapters", "verify", "--json")
    assert (ended.code, ended.json["sound"]) == (1, False)
    assert "adapter_model.safetensors was changed" in deltaw("adapters", "verify").out
    said = ("yes-no", "is damaged", "adapter_model.safetensors was changed")
    refused(deltaw("generate", "--base", base, "--adapter", "yes-no", "ab ?"), "AdapterError", *said)
    refused(deltaw("merge", "--base", base, "--adapter", "yes-no", "--out", tmp_path / "m"), "AdapterError", *said)
    refused(deltaw("inspect", "yes-no"), "AdapterError", *said)
    assert not (tmp_path / "m").exists()


def test_cli_adapters_a_reference_serves_wherever_a_folder_does(
    deltaw: Call, folder: Path, trained: Path, base: Path, tmp_path: Path
) -> None:
    deltaw("adapters", "add", "yes-no", trained)
    write_rows(tmp_path / "rows.jsonl", ROWS[:6])
    wanted = deltaw(
        "eval", "--base", base, "--adapter", trained, "--data", tmp_path / "rows.jsonl", "--metric", "exact", "--json"
    )
    for ref in ("yes-no", "yes-no@1", "yes-no@current"):
        told = deltaw(
            "eval", "--base", base, "--adapter", ref, "--data", tmp_path / "rows.jsonl", "--metric", "exact", "--json"
        )
        assert (told.json["value"], told.json["adapter"]) == (wanted.json["value"], ref)
    told = deltaw("generate", "--base", base, "--adapter", "yes-no@1", "--max-tokens", 5, "ab ?", "--json").json
    assert told == deltaw("generate", "--base", base, "--adapter", trained, "--max-tokens", 5, "ab ?", "--json").json
    assert (
        deltaw("inspect", "yes-no", "--json").json["id"] == deltaw("inspect", trained / "adapter", "--json").json["id"]
    )
    assert deltaw("inspect", base, "--json").json["kind"] == "base"
    merged = deltaw("merge", "--base", base, "--adapter", "yes-no@1", "--out", tmp_path / "m", "--no-check", "--json")
    assert merged.code == 0
    small = deltaw("compress", "--adapter", "yes-no", "--rank", 1, "--out", tmp_path / "small", "--json")
    twice = deltaw("combine", "--adapter", "yes-no", "--adapter", "yes-no@1", "--out", tmp_path / "twice", "--json")
    assert small.json["parent"] == twice.json["parents"][1] == deltaw("inspect", "yes-no", "--json").json["id"]
    plain = deltaw("export", "peft", "--adapter", "yes-no", "--out", tmp_path / "plain", "--json")
    assert plain.json["adapter"] == small.json["parent"]
    served = deltaw("export", "vllm", "--base", base, "--adapter", "yes-no", "--out", tmp_path / "vllm", "--json")
    whole = deltaw("diagnose", "yes-no", "--base", base, "--json")
    assert (served.code, whole.code, whole.json["method"]) == (0, 0, "lora")
    refused(deltaw("inspect", "yes-no@v1"), "RegistryError", "write yes-no@1")
    refused(deltaw("generate", "--base", base, "--adapter", "runs/gone", "x"), "NotFound", "there is no such folder")
    refused(deltaw("generate", "--base", base, "--adapter", "yes-on", "x"), "NotFound", "Did you mean 'yes-no'")


def test_cli_adapters_without_a_registry_a_path_is_a_path(deltaw: Call, base: Path, tmp_path: Path) -> None:
    set_registry(None, None)
    refused(deltaw("generate", "--base", base, "--adapter", "yes-no", "x"), "NotFound", "No adapter at yes-no")
    refused(deltaw("adapters", "list"), "RegistryError", "--registry", "DELTAW_REGISTRY")
    refused(deltaw("adapters", "add", "a b", tmp_path, "--registry", tmp_path / "none"), "RegistryError", "'a b'")
    assert not (tmp_path / "none").exists()
    refused(deltaw("adapters", "list", "--registry", tmp_path / "none"), "NotFound", "No registry at")


def test_cli_adapters_a_new_base_is_told_and_readapted_to(
    deltaw: Call, folder: Path, written: Path, tmp_path: Path
) -> None:
    assert deltaw("train", written, "train.steps=4", "--out", tmp_path / "run", "--json").code == 0
    old = deltaw("adapters", "add", "yes-no", tmp_path / "run", "--json").json["id"]
    base, new = json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["base"]["path"], tmp_path / "new"
    save_base(new, seed=3)
    fits = [deltaw("adapters", "list", "--base", b, "--json").json["adapters"][0] for b in (base, new)]
    assert [(f["fits"], f["differs"]) for f in fits] == [("yes", []), ("no", ["weights"])]
    assert "re-adapt weights" in " ".join(deltaw("adapters", "list", "--base", new).out.split())
    refused(deltaw("generate", "--base", new, "--adapter", "yes-no", "x"), "BaseMismatch", "weights: adapter has")
    ended = deltaw("readapt", "yes-no", "--base", new, "--out", tmp_path / "again", "--json")
    assert (ended.code, ended.events[-1]["event"]) == (0, "done")
    made = deltaw("adapters", "add", "yes-no", tmp_path / "again", "--json").json
    assert made["version"] == 2
    assert deltaw("adapters", "show", "yes-no@2", "--json").json["parents"] == {old: ["yes-no@1"]}
    assert deltaw("readapt", "yes-no", "--base", new, "--out", tmp_path / "again").code == 0
    (tmp_path / "rows.jsonl").unlink()
    again = ("readapt", "yes-no", "--base", new, "--out", tmp_path / "third")
    refused(deltaw(*again), "DataError", "rows.jsonl", "are gone", "--data FILE")
