"""What people break: bad requests, absurd numbers, damaged folders, a full disk. One sentence each, nothing lost."""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from lab_bench import Bench
from lab_page import Page, served

from deltaw.errors import WorkFailed
from deltaw.lab import runs as runs_module
from deltaw.lab.desk import desk_in
from deltaw.lab.plans import Plans
from deltaw.lab.run_files import event_of
from deltaw.lab.runs import Runs
from deltaw.lab.server import POLICY, make_app
from deltaw.lab.work_runs import Tail
from deltaw.store.index import Index
from deltaw.train.checkpoint import save_checkpoint

HERE = "http://127.0.0.1:8765"
ROWS = '{"prompt": "a", "completion": "b"}\n' * 4
STEP = {"event": "step", "step": 1, "tokens": 3, "seconds": 1.0, "loss": 0.5}
RUN = {"recipe": {"base": {"path": "/x"}, "adapter": {"method": "lora", "rank": 2}, "eval": {"metric": "loss"}}}


class Lab:
    """A client of a lab on a folder, which answers faults as a real one does."""

    def __init__(self, tiny: Bench, base: Path, folder: Path) -> None:
        self.base, self.runs = str(base), folder / "runs"
        self.client = TestClient(
            make_app(tiny.lab, desk=desk_in(self.runs)),
            base_url=HERE,
            headers={"origin": HERE, "content-type": "application/json"},
            raise_server_exceptions=False,
        )

    def post(self, path: str, body: Any) -> Any:
        text = body if isinstance(body, str | bytes) else json.dumps(body)
        return self.client.post(f"/api/{path}", content=text)

    def plan(self, **parts: dict[str, Any]) -> Any:
        recipe: dict[str, Any] = {"base": {"path": self.base}, "adapter": {"method": "lora"}}
        for key, part in parts.items():
            recipe[key] = recipe.get(key, {}) | part
        return self.post("work/train/plan", {"recipe": recipe})


@pytest.fixture
def lab(tiny: Bench, tiny_folder: Path, tmp_path: Path) -> Lab:
    return Lab(tiny, tiny_folder, tmp_path)


def told(answer: Any, status: int = 422) -> str:
    """The sentence of a refusal."""
    assert answer.status_code == status, answer.text[:300]
    detail = answer.json()["detail"]
    assert isinstance(detail, str)
    return detail


@pytest.mark.parametrize(
    "body", ["", "{", "[]", "7", "null", b"\xff\xfe", '{"name": 1}', '{"recipe": []}', "[" * 90_000]
)
@pytest.mark.parametrize("path", ["pictures/9", "work/runs", "work/train/plan", "work/data", "work/adapters/add"])
def test_lab_broken_requests_are_refused_in_a_sentence(lab: Lab, path: str, body: str | bytes):
    answer = lab.post(path, body)
    assert answer.status_code in (400, 422), answer.text[:300]
    assert isinstance(answer.json()["detail"], str)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"adapter": {"rank": 10**30}}, "Lora.rank: must be at most 16,777,216"),
        ({"adapter": {"method": "vera", "projection_seed": 10**30}}, "must fit 64 bits"),
        ({"adapter": {"method": "prefix", "hidden": 10**30}}, "hidden is the width"),
        ({"train": {"tokens_per_step": 10**12}}, "4,194,304 tokens is the most"),
        ({"train": {"tokens_per_step": 10**30}}, "4,194,304 tokens is the most"),
        ({"adapter": {"targets": "\ud800"}}, "half a character"),
        ({"base": {"path": "\ud800"}}, "half a character"),
        ({"base": {"path": "/" + "x" * 5000}}, "cannot be looked for: File name too long"),
        ({"base": {"path": "~nobody-at-all/x"}}, "cannot be looked for"),
        ({"base": {"path": ""}}, "no base and no shape is called ''"),
        ({"data": {"train": "/nowhere/rows.jsonl"}}, "does not exist"),
        ({"data": {"train": "a\0b"}}, "cannot be read: embedded null byte"),
        ({"data": {"valid": "x" * 5000}}, "cannot be read: File name too long"),
        ({"data": {"train": "~nobody-at-all/x.jsonl"}}, "cannot be read"),
    ],
)
def test_lab_broken_settings_are_told_and_not_tried(lab: Lab, parts: dict[str, Any], words: str):
    assert words in told(lab.plan(**parts))


def test_lab_broken_rows_may_hold_line_ends_of_other_kinds(lab: Lab):
    row = '{"prompt": "a\u2028b", "completion": "c\x85d\u2029"}'
    kept = lab.post("work/data", {"name": "rows.jsonl", "text": f"{row}\n{ROWS}"}).json()
    assert kept["rows"] == 5
    assert kept["shown"][0] == {"prompt": "a\u2028b", "completion": "c\x85d\u2029"}


def test_lab_broken_a_fault_is_told_with_the_pages_policy(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise AssertionError("a \ud800 fault")

    monkeypatch.setattr(Plans, "plan", fail)
    answer = lab.plan()
    assert "fault of the lab (AssertionError: a ? fault)" in told(answer, 500)
    assert answer.headers["content-security-policy"] == POLICY

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error", "/the/disk")

    monkeypatch.setattr(Plans, "plan", refuse)
    assert "Input/output error (/the/disk)" in told(lab.plan(), 500)


DAMAGED = {
    "nan": json.dumps(STEP | {"loss": float("nan")}),
    "zeros": "\0" * 50,
    "values": '7\n[]\nnull\n"x"\n{}\n{"event": 1}\n{"event": []}',
    "parts": '{"event": "step"}\n{"event": "eval"}\n{"event": "start"}',
    "types": '{"event": "step", "step": "x", "tokens": [], "seconds": {}}',
    "deep": "[" * 90_000,
}


def test_lab_broken_folders_hide_no_other_run(lab: Lab):
    for name, text in DAMAGED.items():
        _made(lab.runs / f"m-{name}", json.dumps(RUN), f"{text}\n{json.dumps(STEP)}\n")
    for name, text in {"empty": "", "seven": "7", "part": '{"recipe": {"adapter": 7, "base": {"path": 5}, "eval": []}}',
                       "list": '{"recipe": [1]}', "deep": "[" * 90_000}.items():  # fmt: skip
        _made(lab.runs / f"r-{name}", text, json.dumps(STEP) + "\n")
    (lab.runs / "recipes").mkdir()
    for name, raw in {"bytes": b"\xff\xfe", "bad": b"a: [", "list": b"- 1", "loop": b"a: &a [*a]"}.items():
        (lab.runs / "recipes" / f"y-{name}.yaml").write_bytes(raw)
    (lab.runs / "itself").symlink_to(lab.runs / "itself")
    every = lab.client.get("/api/work/runs").json()["runs"]
    assert len(every) == len(DAMAGED) + 5 + 4
    steps = {run["name"]: run["step"] for run in every}
    assert {steps[f"m-{name}"] for name in DAMAGED} == {1}, "the good event counts"
    for run in every:
        assert lab.client.get(f"/api/work/runs/{run['name']}").status_code == 200, run["name"]
        assert lab.client.get(f"/api/work/compare?runs={run['name']}").status_code == 200, run["name"]
        diagnosed = lab.client.get(f"/api/work/diagnose?run={run['name']}")
        assert diagnosed.status_code in (200, 404, 422), diagnosed.text
        for _, line in Tail(lab.runs / run["name"] / "metrics.jsonl").read()[1]:
            json.loads(line, parse_constant=lambda c: pytest.fail(f"{c} is no JSON of a browser"))


def _made(folder: Path, run: str, metrics: str) -> None:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(run)
    (folder / "metrics.jsonl").write_text(metrics)


def test_lab_broken_events_are_what_a_run_writes_or_nothing():
    assert event_of(json.dumps(STEP | {"loss": float("inf")}).encode()) == STEP | {"loss": None}
    assert event_of(b'{"event": "eval", "step": 1, "seconds": 1}') is None
    assert event_of(b'{"event": "planned"}') == {"event": "planned"}


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A disk that is full for files whose names end so."""
    ends: list[str] = []
    write = runs_module.write_text

    def fails(path: Path, text: str) -> None:
        if path.name.endswith(tuple(ends)):
            raise WorkFailed(f"No space left while writing {path.name}.")
        write(path, text)

    monkeypatch.setattr(runs_module, "write_text", fails)
    monkeypatch.setattr("deltaw.lab.queue.write_text", fails)
    yield ends
    ends.clear()


def test_lab_broken_a_full_disk_lets_a_run_wait_and_loses_none(lab: Lab, full: list[str]):
    lab.post("work/data", {"name": "rows.jsonl", "text": ROWS})
    recipe = {"base": {"path": lab.base, "dtype": "float32"}, "adapter": {"method": "lora", "rank": 2},
              "data": {"train": str(lab.runs / "data" / "rows.jsonl"), "max_tokens": 32},
              "train": {"steps": 2, "tokens_per_step": 40, "threads": 1}}  # fmt: skip
    full.append("queue.json")
    assert "No space left" in told(lab.post("work/runs", {"name": "one", "recipe": recipe}), 500)
    assert not (lab.runs / "recipes" / "one.yaml").exists(), "its name stays free"
    full[:] = [".pid"]
    begun = lab.post("work/runs", {"name": "one", "recipe": recipe}).json()
    assert begun["state"] == "waiting"
    assert begun["sentence"] == "It cannot begin yet: No space left while writing one.pid."
    full.clear()
    end = time.monotonic() + 90
    while (run := lab.client.get("/api/work/runs/one").json())["state"] != "done":
        assert time.monotonic() < end, run
        time.sleep(0.1)


def test_lab_broken_a_process_that_left_no_word_is_told(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs_module, "PROGRAM", ["sh", "-c", "exit 1"])
    one = Runs(lab.runs)
    one.start("one", {"base": {"path": lab.base}, "adapter": {"method": "lora"}, "data": {"train": "rows.jsonl"}})
    end = time.monotonic() + 30
    while (state := one.state("one"))["state"] == "running":
        assert time.monotonic() < end
    assert state == {"state": "failed", "sentence": "Its process ended with 1 and left no word: is the disk full?"}


def test_lab_broken_a_run_whose_folder_was_removed_fails_with_its_next_checkpoint(tmp_path: Path):
    out = tmp_path / "run"
    _made(out, "{}", "")
    save_checkpoint(out, 1, {}, {})
    shutil.rmtree(out)
    with pytest.raises(WorkFailed, match="was removed, or emptied, while this run trained"):
        save_checkpoint(out, 2, {}, {})
    assert not out.exists()


def test_lab_broken_an_index_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "index.sqlite").write_bytes(b"no database " * 200)
    with pytest.raises(WorkFailed, match="file is not a database"):
        Index(f"sqlite:///{tmp_path}/index.sqlite").create("token")


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lab_broken_files_and_addresses_in_the_page(browser: Any, tiny: Bench, tmp_path: Path):
    for name, raw in {"My rows (1).ndjson": ROWS.encode(), "latin.jsonl": '{"text": "caf\xe9"}'.encode("latin-1"),
                      "empty.jsonl": b""}.items():  # fmt: skip
        (tmp_path / name).write_bytes(raw)
    desk = desk_in(tmp_path / "runs")
    with served(make_app(tiny.lab, desk=desk)) as url:
        one = Page(browser, url)
        page = one.page
        page.goto(f"{url}/#train")
        for name, words in {"latin.jsonl": "latin.jsonl is not UTF-8: save it as UTF-8", "empty.jsonl": "it is empty",
                            "My rows (1).ndjson": "My-rows-1.jsonl is kept: 4 rows"}.items():  # fmt: skip
            page.set_input_files("#upload", str(tmp_path / name))
            page.wait_for_selector(f"text={words}")
        assert [p.name for p in desk.data.iterdir()] == ["My-rows-1.jsonl"]
        page.goto(f"{url}/#runs/%E0%A4%A")
        page.wait_for_selector("text=there is no run '%E0%A4%A'")
        assert [w for w in one.wrong if "Failed to load resource" not in w] == []
        one.close()
