"""A registry keeps adapters by content, under names with versions and labels, and gives back checked bytes."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import delete
from tiny_adapters import BASE, NAME, tiny

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, DeltawError, NotFound, RegistryError, WorkFailed
from deltaw.store import leases
from deltaw.store.gate import Gate, last_object
from deltaw.store.index import Index, sqlite_url
from deltaw.store.index import labels as labels_table
from deltaw.store.objects import MANIFEST
from deltaw.store.peft import CONFIG, OURS, TENSORS, read_adapter, write_adapter
from deltaw.store.references import Reference, parse_reference
from deltaw.store.registry import Registry


@pytest.fixture
def registry(tmp_path) -> Registry:
    return Registry(tmp_path / "a registry? #1", create=True)


@pytest.fixture
def three(registry) -> Registry:
    """support@1 (current), @2 and @3 (candidate)."""
    for seed in (1, 2, 3):
        registry.add("support", tiny(seed, metrics={"valid_loss": 1.5 / seed}))
    return registry


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def on(registry: Registry, name: str = "support") -> dict[str, int]:
    return next(row["labels"] for row in registry.listing() if row["name"] == name)


# References ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("support", Reference("support", label="current")),
        ("support@12", Reference("support", version=12)),
        ("support@blue-2", Reference("support", label="blue-2")),
        ("9f0c21aa", Reference(prefix="9f0c21aa")),
        ("9f0c21a", Reference("9f0c21a", label="current")),
    ],
)
def test_store_registry_a_reference_says_one_thing(text, wanted):
    assert parse_reference(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("support@v3", r"plain numbers; write support@3\."),
        ("support@V07", r"write support@7\."),
        ("support@", "neither a version"),
        ("support@0", "neither a version"),
        ("../secrets", "is no adapter's name"),
        ("a/b", "is no adapter's name"),
        ("", "is no adapter's name"),
        ("a@b@c", "neither a version"),
    ],
)
def test_store_registry_a_bad_reference_is_refused_with_what_to_write(registry, text, said):
    with pytest.raises(RegistryError, match=said):
        registry.folder(text)


def test_store_registry_what_is_not_there_is_named_with_what_is(three):
    with pytest.raises(NotFound, match=r"called 'suport'.*Did you mean 'support'"):
        three.resolve("suport")
    with pytest.raises(NotFound, match="no version 9: its versions are 1, 2, 3, its labels candidate, current"):
        three.resolve("support@9")
    with pytest.raises(NotFound, match="no label 'best'"):
        three.resolve("support@best")
    with pytest.raises(NotFound, match="begins with 0123456789"):
        three.resolve("0123456789")
    with pytest.raises(RegistryError, match="looks like an id"):
        three.add("deadbeef", tiny(1))


def test_store_registry_an_id_s_beginning_is_enough_while_one_has_it(three):
    wanted = three.resolve("support@2")
    assert three.resolve(wanted.id[:8]) == wanted
    assert three.resolve(wanted.id) == wanted
    three.add("other", tiny(2))
    assert three.folder(wanted.id[:8]).name == wanted.id
    with pytest.raises(RegistryError, match=r"held as other@1, support@2: say which"):
        three.promote(wanted.id[:8])


# Versions and labels -------------------------------------------------------------------------------


def test_store_registry_the_first_version_is_current_and_later_ones_candidates(registry):
    made = [registry.add("support", tiny(seed)) for seed in (1, 2, 3)]
    assert [m["version"] for m in made] == [1, 2, 3]
    assert [m["labels"] for m in made] == [["current"], ["candidate"], ["candidate"]]
    assert [m["id"] for m in made] == [tiny(seed).id for seed in (1, 2, 3)]
    assert on(registry) == {"current": 1, "candidate": 3}
    assert registry.resolve("support").version == 1
    again = registry.add("support", tiny(2))
    assert (again["version"], again["new"], again["labels"]) == (2, False, [])
    assert on(registry) == {"current": 1, "candidate": 3}


def test_store_registry_what_was_added_comes_back_bit_for_bit(registry, tmp_path):
    folder = write_adapter(tiny(4), tmp_path / "adapter")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "optimizer.pt").write_bytes(b"\x80not ours")
    registry.add("a", folder)
    back = registry.folder("a")
    assert {p.name for p in back.iterdir()} == {CONFIG, TENSORS, OURS, "README.md", "tokenizer.json", MANIFEST}
    for name in (CONFIG, TENSORS, OURS, "tokenizer.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()
    assert read_adapter(back).id == tiny(4).id == back.name
    shutil.rmtree(folder)
    assert registry.folder("a@1") == back


def test_store_registry_peft_s_own_adapter_gets_an_id(registry, tmp_path):
    folder = write_adapter(tiny(4, None), tmp_path / "adapter")
    (folder / OURS).unlink()
    made = registry.add("foreign", folder)
    back = read_adapter(registry.folder("foreign"))
    assert back.id == made["id"]
    assert back.sites[NAME]["A"].equal(tiny(4).sites[NAME]["A"])
    assert not (folder / OURS).exists()


def test_store_registry_a_broken_adapter_is_not_added(registry, tmp_path):
    folder = write_adapter(tiny(4), tmp_path / "adapter")
    flip(folder / TENSORS, -2)
    with pytest.raises(AdapterError, match="not the one that was saved"):
        registry.add("a", folder)
    with pytest.raises(NotFound, match="no such folder"):
        registry.add("a", tmp_path / "absent")
    assert registry.listing() == []
    assert list((registry.root / "aside").iterdir()) == []


def test_store_registry_what_is_wrong_is_said_of_the_folder_that_was_given(registry, tmp_path):
    folder = write_adapter(tiny(4), tmp_path / "adapter")
    (folder / TENSORS).write_bytes(b"")
    with pytest.raises(AdapterError, match=re.escape(str(folder / TENSORS))):
        registry.add("a", folder)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_store_registry_an_adapter_with_nan_is_not_kept(registry, tmp_path, value):
    sick = tiny(4)
    next(iter(next(iter(sick.sites.values())).values()))[0, 0] = value
    for what in (sick, write_adapter(sick, tmp_path / "adapter")):
        with pytest.raises(AdapterError, match=r"holds NaN or Inf in .*:A"):
            registry.add("a", what)
    assert registry.listing() == []


def test_store_registry_lineage_comes_out_of_the_provenance(registry):
    old = registry.add(
        "support", tiny(1, recipe={"train": {"lr": 0.1}}, data_hash="d" * 64, date="2026-01-02T03:04:05Z")
    )
    registry.add("support", tiny(2, parents=[old["id"]], metrics={"valid_loss": 0.5}))
    first, second = registry.show("support@1"), registry.show("support@2")
    assert (first["recipe"], first["data_hash"]) == ({"train": {"lr": 0.1}}, "d" * 64)
    assert first["date"] == "2026-01-02T03:04:05Z"
    assert first["base"] == BASE.model_dump()
    assert first["children"] == ["support@2"]
    assert second["parents"] == {old["id"]: ["support@1"]}
    assert second["metrics"] == {"valid_loss": 0.5}
    with pytest.raises(RegistryError, match="a list of ids was expected"):
        registry.add("support", tiny(3, parents="support@1"))


def test_store_registry_rollback_goes_back_through_history(three):
    for version in (3, 2):
        assert three.promote(f"support@{version}")["changed"]
    assert not three.promote("support@2")["changed"]
    assert on(three) == {"current": 2, "candidate": 3}
    assert (three.rollback("support")["version"], three.rollback("support")["version"]) == (3, 1)
    with pytest.raises(RegistryError, match="on no earlier version"):
        three.rollback("support")
    three.promote("support@2")
    assert three.rollback("support") == {
        "name": "support", "label": "current", "version": 1, "before": 2, "skipped": [],
    }  # fmt: skip
    moved = [(m["action"], m["before"], m["version"]) for m in three.show("support")["history"][3:]]
    assert moved == [
        ("promote", 1, 3), ("promote", 3, 2), ("rollback", 2, 3), ("rollback", 3, 1), ("promote", 1, 2),
        ("rollback", 2, 1),
    ]  # fmt: skip


def test_store_registry_rollback_passes_over_what_was_removed(three):
    for version in (2, 3):
        three.promote(f"support@{version}")
    three.remove("support@2")
    told = three.rollback("support")
    assert (told["version"], told["skipped"]) == (1, [2])


def test_store_registry_any_label_moves_and_comes_off(three):
    three.promote("support@2", "blue")
    three.promote("support@3", "blue")
    assert three.resolve("support@blue").version == 3
    assert three.rollback("support", "blue")["version"] == 2
    assert three.unlabel("support", "blue")["before"] == 2
    with pytest.raises(NotFound, match="no label 'blue'"):
        three.unlabel("support", "blue")
    assert three.rollback("support", "blue")["version"] == 2
    with pytest.raises(RegistryError, match="neither a version"):
        three.promote("support@2", "7")


# Removing ------------------------------------------------------------------------------------------


def test_store_registry_what_something_refers_to_is_not_removed(three):
    with pytest.raises(RegistryError, match="support@1 is current: promote another version first"):
        three.remove("support")
    three.add("child", tiny(8, parents=[tiny(2).id]))
    with pytest.raises(RegistryError, match="support@2 is a parent of child@1: remove child@1 first"):
        three.remove("support@2")
    three.add("copy", tiny(2))
    assert three.remove("support@2")["removed"]  # its adapter is held as copy@1 still
    three.unlabel("copy", "current")
    with pytest.raises(RegistryError, match="copy@1 is a parent of child@1"):
        three.remove("copy@1")


def test_store_registry_a_version_s_number_is_never_given_again(three):
    three.unlabel("support", "candidate")
    three.remove("support@3")
    assert three.add("support", tiny(3))["version"] == 4
    with pytest.raises(NotFound, match="no version 3"):
        three.folder("support@3")
    for label in ("current", "candidate"):
        three.unlabel("support", label)
    for version in (1, 2, 4):
        three.remove(f"support@{version}")
    assert three.listing() == []
    made = three.add("support", tiny(1))
    assert (made["version"], made["labels"]) == (5, ["current"])


def test_store_registry_gc_deletes_only_what_nothing_refers_to(three):
    held = three.folder("support@2")  # this process uses it from here on
    three.add("x", tiny(9))
    three.unlabel("x", "current")
    for ref in ("x@1", "support@2"):
        three.remove(ref)
    three.add("child", tiny(8, parents=[tiny(9).id]))
    assert three.gc() == {"deleted": [], "in_use": [held.name], "bytes": 0, "left_aside": 0}
    assert read_adapter(held).id == tiny(2).id
    leases._held.pop(next(key for key in leases._held if key[1] == three.root)).end()  # as when the process ends
    assert list((three.root / "leases").iterdir()) == []
    told = three.gc()
    assert (told["deleted"], told["in_use"]) == ([held.name], [])
    assert told["bytes"] > 1000
    assert not held.exists()
    assert (three.root / "objects" / tiny(9).id[:2] / tiny(9).id).is_dir(), "child@1 was made from it"
    assert three.verify()["sound"]
    assert three.add("support", tiny(2))["version"] == 4
    assert read_adapter(three.folder("support@4")).id == tiny(2).id


# Damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [CONFIG, TENSORS, OURS, "README.md", MANIFEST])
def test_store_registry_a_flipped_bit_is_found_never_served_and_can_be_mended(three, name):
    folder = three.folder("support@2")
    for at in (0, len((folder / name).read_bytes()) // 2, -1):
        flip(folder / name, at)
        with pytest.raises(AdapterError, match=rf"support@2 \(\w+\) is damaged in the registry .*: {name} was changed"):
            three.folder("support@2")
        flip(folder / name, at)
    assert three.folder("support@2") == folder
    flip(folder / name, 5)
    told = three.verify()
    assert (told["sound"], [d["versions"] for d in told["damaged"]]) == (False, [["support@2"]])
    with pytest.raises(AdapterError, match="is damaged"):
        three.push("support@2", "memory://damaged")
    assert not three.add("support", tiny(2))["new"]
    assert three.verify() == {"sound": True, "damaged": [], "problems": [], "checked": 3, "unreferenced": 0}


def test_store_registry_what_is_gone_added_or_forged_is_found(three):
    folder = three.folder("support@1")
    (folder / "extra.bin").write_bytes(b"1")
    with pytest.raises(AdapterError, match=r"extra\.bin was added"):
        three.folder("support@1")
    (folder / "extra.bin").unlink()
    (folder / "README.md").rename(folder.parent / "kept")
    with pytest.raises(AdapterError, match=r"README\.md is gone"):
        three.folder("support@1")
    (folder / "README.md").symlink_to(folder.parent / "kept")
    with pytest.raises(AdapterError, match="no plain file"):
        three.folder("support@1")
    shutil.rmtree(folder)
    shutil.copytree(three.folder("support@2"), folder)
    with pytest.raises(AdapterError, match="was changed"):
        three.folder("support@1")
    shutil.rmtree(folder)
    with pytest.raises(AdapterError, match="its folder is gone"):
        three.folder("support@1")
    assert three.verify()["damaged"][0]["why"] == "its folder is gone"


def test_store_registry_verify_finds_an_index_that_does_not_hold_together(three):
    with three.index.writing() as db:
        db.exec_driver_sql("UPDATE deltaw_names SET last_version = 1")
    told = three.verify()
    assert not told["sound"]
    assert told["problems"] == ["support would give version 3 again"]


def test_store_registry_another_or_a_lost_index_is_refused(three, tmp_path):
    with pytest.raises(NotFound, match="No registry at"):
        Registry(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"1")
    with pytest.raises(RegistryError, match=r"something that is no registry \(me\.jpg\)"):
        Registry(tmp_path / "photos", create=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".registry.json.0a1b2c3d").write_text("{")  # a process was killed while it made one
    other = Registry(tmp_path / "other", create=True)
    assert {p.name for p in other.root.iterdir()} <= {"registry.json", "index.sqlite", ".lock"}
    with pytest.raises(RegistryError, match="keeps its index in its folder"):
        Registry(three.root, index=f"sqlite:///{other.root / 'index.sqlite'}")
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.sqlite'}"
    Registry(tmp_path / "split", index=elsewhere, create=True).add("a", tiny(1))
    assert Registry(tmp_path / "split", index=elsewhere).resolve("a@1").id == tiny(1).id
    with pytest.raises(RegistryError, match="holds 1 adapters of another registry"):
        Registry(tmp_path / "second", index=elsewhere, create=True)
    (tmp_path / "split" / "registry.json").unlink()  # lost, or its making was killed: it is made again
    assert Registry(tmp_path / "split", index=elsewhere, create=True).resolve("a@1").id == tiny(1).id
    with pytest.raises(RegistryError, match="a database elsewhere: give its URL"):
        Registry(tmp_path / "split")
    shutil.copy(other.root / "index.sqlite", tmp_path / "elsewhere.sqlite")
    with pytest.raises(RegistryError, match="is not the one of the registry"):
        Registry(tmp_path / "split", index=elsewhere)
    (other.root / "index.sqlite").unlink()
    with pytest.raises(RegistryError, match=r"index\.sqlite is gone: restore it"):
        Registry(other.root)
    with pytest.raises(RegistryError, match="index cannot be opened"):
        Registry(tmp_path / "odd", index="nonsense://x", create=True)


def test_store_registry_a_failing_index_says_what_to_do(three):
    index = three.root / "index.sqlite"
    with sqlite3.connect(index) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = index.read_bytes()
    for broken in (whole[: len(whole) // 3], b"no database at all" * 400):
        index.write_bytes(broken)
        with pytest.raises(WorkFailed, match=r"failed: .*\. Restore it from a copy; objects/ is untouched\."):
            Registry(three.root).listing()
    with pytest.raises(WorkFailed, match=r"unable to open database file\. Whoever uses a registry must be able to"):
        Index(sqlite_url(three.root / "absent")).token()


# Gates ----------------------------------------------------------------------------------------------

SCORE = """
import json, sys
score = json.load(open(sys.argv[1] + "/deltaw.json"))["provenance"]["score"]
print("a line")
print(json.dumps({"metric": "exact", "value": score}, indent=1))
"""


@pytest.fixture
def command(tmp_path) -> Callable[..., str]:
    """The gate's command: a Python program that prints an adapter's noted score."""

    def made(code: str = SCORE) -> str:
        (tmp_path / "score it.py").write_text(code)
        return f"'{sys.executable}' '{tmp_path}/score it.py' {{adapter}}"

    return made


@pytest.fixture
def scored(registry) -> Registry:
    for seed, score in ((1, 0.5), (2, 0.75), (3, 0.5)):
        registry.add("support", tiny(seed, score=score))
    return registry


def test_store_registry_a_gate_that_is_passed_promotes_and_is_kept(scored, command):
    told = scored.promote("support@2", gate=Gate(command(), min_gain=0.25, min_value=0.7))
    assert (told["before"], told["version"]) == (1, 2)
    assert (told["gate"]["value"], told["gate"]["against_value"], told["gate"]["passed"]) == (0.75, 0.5, True)
    (kept,) = scored.show("support@2")["gates"]
    assert (kept["value"], kept["against"], kept["against_value"], kept["min_gain"]) == (0.75, 1, 0.5, 0.25)
    assert (kept["command"], kept["passed"]) == (command(), True)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_gain": 0.26}, r"support@2 has 0\.75, support@1 0\.5; asked was a gain of at least 0\.26"),
        ({"min_value": 0.8}, r"asked was a value of at least 0\.8"),
        ({"min_gain": 0.1, "min_value": 0.8}, r"a gain of at least 0\.1 and a value of at least 0\.8"),
    ],
)
def test_store_registry_a_gate_that_is_not_passed_changes_no_label(scored, command, limits, said):
    with pytest.raises(WorkFailed, match=said):
        scored.promote("support@2", gate=Gate(command(), **limits))
    assert on(scored) == {"current": 1, "candidate": 3}
    assert [g["passed"] for g in scored.show("support@2")["gates"]] == [False]


def test_store_registry_a_gate_for_a_label_on_nothing_asks_for_no_gain(scored, command):
    told = scored.promote("support@3", "best", Gate(command(), min_gain=10.0))
    assert (told["gate"]["against"], told["gate"]["against_value"], told["before"]) == (None, None, None)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print(3)", r'no JSON object with a finite "value" last \(found None\)'),
        ("print('{\"value\": NaN}')", "found nan"),
        ("print('{\"value\": true}')", "found True"),
        ("raise SystemExit(3)", "ended with 3"),
    ],
)
def test_store_registry_a_gate_that_measures_nothing_is_an_error(scored, command, code, said):
    with pytest.raises(WorkFailed, match=said):
        scored.promote("support@2", gate=Gate(command(code), min_gain=0.0))
    assert on(scored)["current"] == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"command": "measure it", "min_gain": 0.0}, "has no {adapter}"),
        ({"command": "measure {adapter}"}, "needs what must hold"),
        ({"command": "measure {adapter}", "min_gain": float("nan")}, "finite number"),
        ({"command": "measure '{adapter}", "min_gain": 0.0}, "cannot be split"),
    ],
)
def test_store_registry_a_gate_that_makes_no_sense_is_refused(asked, said):
    with pytest.raises(RegistryError, match=said):
        Gate(**asked)


def test_store_registry_no_shell_runs_a_gate(scored, tmp_path):
    with pytest.raises(RegistryError, match="'no-such-program' cannot be run"):
        scored.promote("support@2", gate=Gate(f"no-such-program {{adapter}}; touch {tmp_path}/ran", min_gain=0.0))
    assert not (tmp_path / "ran").exists()


def test_store_registry_a_label_that_moves_while_a_gate_runs_stops_it(scored, command, monkeypatch):
    measure = Gate.measure

    def slow(self, folder, against):
        scored.promote("support@3")
        return measure(self, folder, against)

    monkeypatch.setattr(Gate, "measure", slow)
    with pytest.raises(WorkFailed, match="moved from 1 to 3 while the gate ran"):
        scored.promote("support@2", gate=Gate(command(), min_gain=0.0))
    assert on(scored)["current"] == 3


def test_store_registry_the_last_object_of_an_output_counts():
    assert last_object('{"value": 1}\nnoise {\n{"value": 2, "x": {"value": 3}}\n[1]\n') == {
        "value": 2,
        "x": {"value": 3},
    }
    assert last_object('{\n "value": 5\n}\n') == {"value": 5}
    assert last_object("{broken\n1\n") == {}


# Looking across ---------------------------------------------------------------------------------------


def test_store_registry_the_list_says_what_fits_a_new_base(registry):
    registry.add("fits", tiny(1))
    registry.add("soft", tiny(1, replace_print(chat_template="beef" * 16)))
    registry.add("other", tiny(1, replace_print(weights="0" * 64, tokenizer="1" * 64)))
    registry.add("foreign", tiny(1, None))
    rows = {r["name"]: (r["fits"], r["differs"]) for r in registry.listing(BASE)}
    assert rows == {
        "fits": ("yes", []),
        "soft": ("yes", ["chat_template"]),
        "other": ("no", ["weights", "tokenizer"]),
        "foreign": ("unknown", []),
    }
    assert "fits" not in registry.listing()[0]


def replace_print(**changes: str):
    return BASE.model_copy(update=changes)


def test_store_registry_diff_says_what_differs(registry):
    old = registry.add("a", tiny(1, recipe={"train": {"lr": 1.0, "seed": 0}}, data_hash="x", metrics={"loss": 2.0}))
    changed = tiny(1)
    changed.sites[NAME]["B"][1, 2] += 0.5
    spec = changed.spec.model_copy(update={"alpha": 6.0})
    note = {"recipe": {"train": {"lr": 2.0, "seed": 0}}, "data_hash": "y", "parents": [old["id"]]}
    registry.add("b", replace(changed, spec=spec, provenance=note))
    told = registry.diff("a", "b")
    assert told["settings"] == {"alpha": [5.0, 6.0]}
    assert told["recipe"] == {"train.lr": [1.0, 2.0]}
    assert (told["data_hash"], told["metrics"]) == (["x", "y"], [{"loss": 2.0}, None])
    assert told["related"] == "a@1 is a parent of b@1"
    assert {k: v for k, v in told["tensors"].items() if k != "largest_change"} == {
        "same": 1, "changed": 1, "only_a": 0, "only_b": 0,
    }  # fmt: skip
    assert told["tensors"]["largest_change"] == pytest.approx(0.5, abs=1e-6)
    assert registry.diff("a", "a")["same"]


# At once ---------------------------------------------------------------------------------------------


def test_store_registry_threads_that_add_at_once_get_numbers_of_their_own(registry):
    made: list[dict] = []
    failed: list[DeltawError] = []

    def work(first: int) -> None:
        try:
            made.extend(Registry(registry.root).add("support", tiny(seed)) for seed in range(first, first + 5))
        except DeltawError as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert sorted(m["version"] for m in made) == list(range(1, 21))
    assert registry.verify()["sound"]


def test_store_registry_is_public_and_takes_adapters_and_folders(tmp_path):
    kept = deltaw.Registry(tmp_path / "r", create=True)
    assert isinstance(tiny(1), Adapter)
    kept.add("a", tiny(1))
    kept.add("a", str(kept.folder("a")))
    assert [v["version"] for v in kept.show("a")["versions"]] == [1]
    with kept.index.writing() as db:
        db.execute(delete(labels_table))
    assert json.loads(json.dumps(kept.listing()))[0]["id"] is None
    with pytest.raises(NotFound, match="no label 'current'"):
        kept.folder("a")
