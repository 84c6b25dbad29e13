"""The workbench's diagnosis: what `deltaw diagnose` finds, with what it stands on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from desk_bench import HERE, SAME, STEPS, filled, noise, real_run
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.diagnose.diagnose import diagnose
from deltaw.diagnose.report import json_safe
from deltaw.errors import WorkFailed
from deltaw.lab.checks import Check, Checks
from deltaw.lab.desk import Desk
from deltaw.lab.server import make_app
from deltaw.store import objects
from deltaw.store.registry import Registry


@pytest.fixture(scope="module")
def desk(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("desk")
    return filled(tiny_folder, root, real_run(tiny_folder, root / "run"))


@pytest.fixture(scope="module")
def client(tiny: Bench, desk: Desk) -> Iterator[TestClient]:
    with TestClient(make_app(tiny.lab, desk=desk), base_url=HERE) as opened:
        yield opened


def plain(value: Any) -> Any:
    """As JSON carries it."""
    return json.loads(json.dumps(json_safe(value)))


def test_lab_work_diagnose_a_run_shows_what_diagnose_finds_without_the_base(client: TestClient, desk: Desk):
    told = client.get("/api/work/diagnose?run=first").json()
    found = diagnose(desk.runs / "first", alone=True)
    wanted = plain(found.as_dict())
    assert {k: told[k] for k in wanted} == wanted
    assert told["steps"] == [[s.step, s.loss, s.lr] for s in found.log.steps]
    assert len(told["steps"]) == STEPS
    assert told["slow"] == {}
    assert all(row["weight_norm"] is None for row in told["places"])
    assert [b["what"] for b in told["bands"]] == ["effective scale, alpha / rank"]
    assert told["bands"][0]["value"] == pytest.approx(1.5)
    assert {"loss", "spectra", "norms", "ranks"} == set(told["captions"])


def test_lab_work_diagnose_an_adapter_of_the_registry_by_reference(client: TestClient, desk: Desk):
    told = client.get("/api/work/diagnose?adapter=support@2").json()
    assert told["adapter"] == Registry(desk.registry).resolve("support@2").id
    assert told["curve"] is None
    assert "loss curve" in {n["check"] for n in told["not_made"]}


def test_lab_work_diagnose_nan_is_found_and_can_be_carried(client: TestClient, desk: Desk, tiny_folder: Path):
    with pytest.MonkeyPatch.context() as before:  # kept when nobody looked for NaN yet
        before.setattr(objects, "not_finite", lambda tensors: [])
        Registry(desk.registry).add("broken", noise(tiny_folder, 5, size=float("nan")))
    told = client.get("/api/work/diagnose?adapter=broken").json()
    assert [f["kind"] for f in told["findings"]] == ["not_finite"]


def test_lab_work_diagnose_what_changes_is_looked_at_again(client: TestClient, desk: Desk):
    copy = desk.runs / "copy"
    shutil.copytree(desk.runs / "first", copy)
    assert len(client.get("/api/work/diagnose?run=copy").json()["steps"]) == STEPS
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[:12]))
    assert 5 < len(client.get("/api/work/diagnose?run=copy").json()["steps"]) < 12
    shutil.rmtree(copy)


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("", 422, "Say what to look at"),
        ("?run=first&adapter=support", 422, "Say what to look at"),
        ("?run=frist", 404, "there is no run 'frist'"),
        ("?run=../run", 404, "there is no run"),
        ("?adapter=../../etc", 422, "is no adapter's name"),
        ("?adapter=nobody", 404, "No adapter is called"),
        ("?path=/etc", 422, "unknown setting 'path'"),
    ],
)
def test_lab_work_diagnose_what_cannot_be_looked_at_is_said(client: TestClient, query: str, status: int, words: str):
    answer = client.get(f"/api/work/diagnose{query}")
    assert answer.status_code == status
    assert words in answer.json()["detail"]


def test_lab_work_diagnose_slow_checks_are_guarded_and_checked(client: TestClient):
    for headers in ({}, {"origin": "http://evil.example"}):
        for what in ("start", "stop"):
            assert client.post(f"/api/work/diagnose/{what}", json={"run": "first"}, headers=headers).status_code == 403
    for given in ({"check": "all"}, {"rank": 0}, {"base": "/etc"}):
        wrong = client.post("/api/work/diagnose/start", json={"run": "first", **given}, headers=SAME)
        assert wrong.status_code == 422
    never = client.post("/api/work/diagnose/stop", json={"run": "first", "check": "rank"}, headers=SAME)
    assert "never begun" in never.json()["detail"]


def test_lab_work_diagnose_a_check_that_fails_says_its_sentence(tmp_path: Path):
    check = Check(["adapters", "list", "--registry", str(tmp_path / "gone")])  # as any command fails, but sooner
    check.wait(120)
    assert check.state == "failed"
    assert check.error is not None
    assert check.error.startswith("No registry at")


def test_lab_work_diagnose_a_check_can_be_stopped_and_few_run_at_once(tmp_path: Path):
    checks = Checks()
    words = ["diagnose", str(tmp_path), "--json"]
    first, second = (checks.start((n,), words) for n in (1, 2))
    with pytest.raises(WorkFailed, match="2 checks run already"):
        checks.start((3,), words)
    assert checks.start((1,), words) is first
    with pytest.raises(WorkFailed, match="with other settings"):
        checks.start((1,), [*words, "--strict"])
    checks.stop_all()
    for check in (first, second):
        check.wait(60)
        assert check.state == "stopped"
    third = checks.start((3,), words)
    assert third.state == "running"
    third.stop()
