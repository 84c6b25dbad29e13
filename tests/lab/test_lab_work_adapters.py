"""The workbench's registry pages: everything through the registry's own functions."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from desk_bench import HERE, SAME, copied, filled, noise, real_run
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.lab.desk import Desk, desk_in
from deltaw.lab.server import make_app
from deltaw.store.gate import Gate
from deltaw.store.registry import Registry


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_run(tiny_folder, tmp_path_factory.mktemp("run") / "first")


@pytest.fixture(scope="module")
def still(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory, run: Path) -> Desk:
    return filled(tiny_folder, tmp_path_factory.mktemp("still"), run)


@pytest.fixture(scope="module")
def reader(tiny: Bench, still: Desk) -> Iterator[TestClient]:
    """For what changes nothing."""
    with TestClient(make_app(tiny.lab, desk=still), base_url=HERE) as opened:
        yield opened


@pytest.fixture
def desk(still: Desk, tmp_path: Path) -> Desk:
    return copied(still, tmp_path)


@pytest.fixture
def client(tiny: Bench, desk: Desk) -> Iterator[TestClient]:
    with TestClient(make_app(tiny.lab, desk=desk), base_url=HERE) as opened:
        yield opened


def test_lab_work_adapters_a_desk_without_a_registry_says_so_and_makes_none(tiny: Bench, tmp_path: Path):
    desk = desk_in(tmp_path / "runs")
    with TestClient(make_app(tiny.lab, desk=desk), base_url=HERE) as client:
        told = client.get("/api/work/adapters").json()
        assert (told["exists"], told["rows"], told["registry"]) == (False, [], desk.registry)
        assert client.get("/api/work/adapters/support").status_code == 404
        assert client.get("/api/work/ask/choices").json()["registry"] == []
        assert client.get("/api/work/diagnose/subjects").json() == {"runs": [], "adapters": [], "more": False}
    assert not Path(desk.registry).exists()


def test_lab_work_adapters_a_row_has_what_the_registry_knows(reader: TestClient, still: Desk):
    told = reader.get("/api/work/adapters").json()
    registry = Registry(still.registry)
    assert [r["name"] for r in told["rows"]] == ["child", "far", "support"]
    child, far, support = told["rows"]
    shown = registry.show("support@1")
    for key in ("id", "method", "n_parameters", "bytes", "added", "metrics"):
        assert support[key] == shown[key], key
    assert (support["labels"], support["versions"], support["shown"]) == ({"current": 1, "candidate": 2}, 2, 1)
    assert support["metrics"] == {"valid_loss": 0.5}
    assert child["parents"] == [{"id": shown["id"], "names": ["support@1"], "how": "made from"}]
    assert [p["how"] for p in far["parents"]] == ["re-adapted from"]
    assert (far["fits"], far["base"].split("@")[0], child["fits"]) == ("no", "Other-7B", "yes")


def test_lab_work_adapters_search_and_pages(client: TestClient, desk: Desk, tiny_folder: Path):
    registry, made = Registry(desk.registry), noise(tiny_folder, 9)
    for n in range(27):
        registry.add(f"task-{n:02}", made)
    first, second = (client.get(f"/api/work/adapters?search=task lora&page={n}").json() for n in (1, 2))
    assert (first["total"], first["all"], len(first["rows"]), len(second["rows"])) == (27, 30, 25, 2)
    assert second["rows"][-1]["name"] == "task-26"
    assert client.get("/api/work/adapters?search=task&page=99").json()["page"] == 2
    assert [r["name"] for r in client.get("/api/work/adapters?search=other-7").json()["rows"]] == ["far"]
    assert client.get("/api/work/adapters?search=nothing").json()["total"] == 0


def test_lab_work_adapters_a_name_has_versions_lineage_labels_and_trail(reader: TestClient):
    told = reader.get("/api/work/adapters/support").json()
    assert [v["version"] for v in told["versions"]] == [2, 1]
    assert told["labels"] == {"current": 1, "candidate": 2}
    assert told["versions"][1]["children"] == [{"name": "child@1", "how": "made from"}]
    assert told["versions"][0]["children"] == [{"name": "far@1", "how": "re-adapted from"}]
    assert told["versions"][0]["date"] == "2026-11-01"
    assert {(e["action"], e["label"]) for e in told["trail"]} == {("add", "current"), ("add", "candidate")}
    assert told["gates"] == {}


def test_lab_work_adapters_a_difference_is_the_registrys(reader: TestClient, still: Desk):
    told = reader.get("/api/work/adapters/support/diff?a=1&b=2").json()
    assert told == Registry(still.registry).diff("support@1", "support@2")
    assert told["tensors"]["changed"] > 0


def test_lab_work_adapters_promote_and_roll_back(client: TestClient, desk: Desk):
    done = client.post("/api/work/adapters/support/promote", json={"version": 2}, headers=SAME)
    assert (done.status_code, done.json()["before"], done.json()["changed"]) == (200, 1, True)
    assert Registry(desk.registry).resolve("support").version == 2
    back = client.post("/api/work/adapters/support/rollback", json={}, headers=SAME).json()
    assert (back["version"], back["before"]) == (1, 2)
    again = client.post("/api/work/adapters/support/rollback", json={}, headers=SAME)
    assert again.status_code == 422
    assert "nothing to go back to" in again.json()["detail"]
    blue = client.post("/api/work/adapters/support/promote", json={"version": 2, "label": "blue"}, headers=SAME)
    assert blue.json()["label"] == "blue"


def test_lab_work_adapters_the_gate_of_a_name_is_asked_again_and_its_sentence_told(
    client: TestClient, desk: Desk, tmp_path: Path
):
    registry = Registry(desk.registry)
    measure, value = tmp_path / "measure.py", tmp_path / "value.txt"
    measure.write_text(f"import json; print(json.dumps({{'value': float(open({str(value)!r}).read())}}))")
    value.write_text("0.5")
    asked = client.post("/api/work/adapters/support/promote", json={"version": 2, "gate": True}, headers=SAME)
    assert asked.status_code == 422
    assert "no gate yet" in asked.json()["detail"]
    registry.promote("support@2", gate=Gate(f"{sys.executable} {measure} {{adapter}}", min_value=0.4))
    registry.rollback("support")
    told = client.get("/api/work/adapters/support").json()
    assert told["gates"]["current"]["min_value"] == 0.4
    value.write_text("0.3")
    refused = client.post("/api/work/adapters/support/promote", json={"version": 2, "gate": True}, headers=SAME)
    assert refused.status_code == 500
    assert "The gate is not passed: support@2 has 0.3" in refused.json()["detail"]
    assert registry.resolve("support").version == 1
    value.write_text("0.6")
    passed = client.post("/api/work/adapters/support/promote", json={"version": 2, "gate": True}, headers=SAME)
    assert passed.json()["gate"]["value"] == 0.6
    assert registry.resolve("support").version == 2
    trail = client.get("/api/work/adapters/support").json()["trail"]
    assert [e["passed"] for e in trail if e["kind"] == "gate"] != []


def test_lab_work_adapters_no_request_names_a_command(client: TestClient, desk: Desk):
    body = {"version": 2, "gate": {"command": "touch {adapter}"}}
    assert client.post("/api/work/adapters/support/promote", json=body, headers=SAME).status_code == 422
    body = {"version": 2, "command": "touch {adapter}"}
    refused = client.post("/api/work/adapters/support/promote", json=body, headers=SAME)
    assert refused.status_code == 422
    assert "unknown setting 'command'" in refused.json()["detail"]
    assert Registry(desk.registry).resolve("support").version == 1


def test_lab_work_adapters_a_runs_adapter_is_added_by_the_registrys_rules(tiny: Bench, tmp_path: Path, run: Path):
    desk = desk_in(tmp_path / "runs")
    desk.runs.mkdir()
    (desk.runs / "first").symlink_to(run, target_is_directory=True)
    with TestClient(make_app(tiny.lab, desk=desk), base_url=HERE) as client:
        told = client.get("/api/work/adapters").json()
        assert (told["exists"], told["runs"]) == (False, ["first"])
        made = client.post("/api/work/adapters/add", json={"name": "keys", "run": "first"}, headers=SAME).json()
        assert (made["version"], made["labels"], made["new"]) == (1, ["current"], True)
        again = client.post("/api/work/adapters/add", json={"name": "keys", "run": "first"}, headers=SAME).json()
        assert (again["version"], again["new"]) == (1, False)
    assert Registry(desk.registry).show("keys@1")["metrics"]["step"] == 20
    assert json.loads((run / "adapter" / "deltaw.json").read_text())


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "adapters/nobody", None, 404, "No adapter is called 'nobody'"),
        ("GET", "adapters/suport", None, 404, "support"),
        ("GET", "adapters/support@1", None, 422, "is no adapter's name"),
        ("GET", "adapters/..", None, 404, ""),
        ("GET", "adapters/%2e%2e%2fetc", None, 404, ""),
        ("GET", "adapters/support/diff?a=1&b=9", None, 404, "support has no version 9"),
        ("GET", "adapters/support/diff?a=1&b=x", None, 422, "Two.b"),
        ("GET", "adapters?page=0", None, 422, "greater than or equal to 1"),
        ("GET", "adapters?find=x", None, 422, "unknown setting 'find'"),
        ("POST", "adapters/support/promote", {"version": 9}, 404, "no version 9"),
        ("POST", "adapters/support/promote", {"version": 1, "label": "v2"}, 422, "versions are plain numbers"),
        ("POST", "adapters/support/promote", {"version": 1, "label": "../x"}, 422, "neither a version"),
        ("POST", "adapters/nobody/rollback", {}, 404, "No adapter is called"),
        ("POST", "adapters/add", {"name": "../x", "run": "first"}, 422, "is no adapter's name"),
        ("POST", "adapters/add", {"name": "x", "run": "../first"}, 404, "there is no run '../first'"),
        ("POST", "adapters/add", {"name": "x", "run": ".."}, 404, "there is no run"),
        ("POST", "adapters/add", {"name": "x", "run": "registry"}, 404, "there is no run"),
        ("POST", "adapters/add", {"name": "x", "run": "fi\0rst"}, 404, "there is no run"),
        ("POST", "adapters/add", {"name": "x"}, 422, "run"),
    ],
)  # fmt: skip
def test_lab_work_adapters_what_cannot_be_is_said_in_a_sentence(
    reader: TestClient, method: str, path: str, body: dict[str, object] | None, status: int, words: str
):
    answer = reader.request(method, f"/api/work/{path}", json=body, headers=SAME)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]


def test_lab_work_adapters_another_site_changes_nothing(reader: TestClient, still: Desk):
    for headers in ({}, {"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        for path, body in (("support/promote", {"version": 2}), ("support/rollback", {}), ("add", {"name": "x"})):
            assert reader.post(f"/api/work/adapters/{path}", json=body, headers=headers).status_code == 403
    assert Registry(still.registry).resolve("support").version == 1


def test_lab_work_adapters_a_broken_registry_is_said_in_a_sentence(client: TestClient, desk: Desk):
    (Path(desk.registry) / "registry.json").write_text("{")
    answer = client.get("/api/work/adapters")
    assert answer.status_code == 422
    assert "cannot be read" in answer.json()["detail"]
