"""Runs of the workbench: real trainings of a tiny base, each a process of its own, begun, stopped, killed, resumed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.lab.desk import desk_in
from deltaw.lab.runs import Runs
from deltaw.lab.server import make_app
from deltaw.lab.work_runs import Tail, told_events
from deltaw.train.run import train

HERE = "http://127.0.0.1:8765"
ROWS = [{"prompt": f"{'ab'[i % 2]}{'o' * (i % 3)}?", "completion": ["yes", "no"][i % 2]} for i in range(12)]
LONG = 10_000
"""Steps of a run that is still training when a test looks at it."""


class Work:
    """A workbench's client, with a desk in a fresh folder."""

    def __init__(self, lab: Bench, folder: Path, base: Path) -> None:
        self.runs = folder / "runs"
        self.base = str(base)
        self.client = TestClient(make_app(lab.lab, desk=desk_in(self.runs)), base_url=HERE, headers={"origin": HERE})

    def get(self, path: str) -> Any:
        return self.client.get(f"/api/work/{path}")

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.client.post(f"/api/work/{path}", json=body or {})

    def recipe(self, steps: int = 4, **train: Any) -> dict[str, Any]:
        return {
            "base": {"path": self.base, "dtype": "float32"},
            "adapter": {"method": "lora", "rank": 3, "alpha": 5},
            "data": {"train": str(self.runs / "data" / "rows.jsonl"), "max_tokens": 32},
            "train": {"steps": steps, "tokens_per_step": 40, "lr": 0.01, "threads": 1, "save_every_s": 1000, **train},
        }

    def keep(self) -> None:
        text = "".join(json.dumps(row) + "\n" for row in ROWS)
        assert self.post("data", {"name": "rows.jsonl", "text": text}).status_code == 200

    def until(self, name: str, reached: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
        """What a run says, once it says so."""
        end = time.monotonic() + seconds
        while True:
            run = self.get(f"runs/{name}").json()
            if reached(run):
                return dict(run)
            assert time.monotonic() < end, run
            time.sleep(0.05)

    def ended(self, name: str) -> dict[str, Any]:
        return self.until(name, lambda run: run["state"] not in ("running", "waiting"))

    def pid(self, name: str) -> int:
        return int(json.loads((self.runs / "recipes" / f"{name}.pid").read_text())["pid"])


@pytest.fixture
def work(tiny: Bench, tiny_folder: Path, tmp_path: Path) -> Iterator[Work]:
    one = Work(tiny, tmp_path, tiny_folder)
    one.keep()
    yield one
    for run in one.get("runs").json()["runs"]:
        if run["state"] == "waiting":
            one.post(f"runs/{run['name']}/stop")
    for kept in (one.runs / "recipes").glob("*.pid"):
        if one.get(f"runs/{kept.stem}").json()["state"] == "running":
            os.kill(one.pid(kept.stem), signal.SIGKILL)


def test_lab_work_a_run_is_begun_watched_and_done(work: Work):
    begun = work.post("runs", {"name": "first", "recipe": work.recipe()})
    assert begun.status_code == 200, begun.text
    assert begun.json()["state"] == "running"
    done = work.ended("first")
    assert done["state"] == "done", done
    assert (done["step"], done["n_steps"], done["method"], done["base"]) == (4, 4, "lora, rank 3", "tiny")
    assert done["growth"] > 0
    assert done["result"] == str(work.runs / "first" / "adapter")
    assert (work.runs / "first" / "adapter" / "adapter_model.safetensors").is_file()
    assert done["command"] == f"deltaw train {work.runs / 'recipes' / 'first.yaml'} --out {work.runs / 'first'}"
    listed = work.get("runs").json()["runs"]
    assert [(r["name"], r["state"]) for r in listed] == [("first", "done")]
    for what in ("stop", "resume"):
        refused = work.post(f"runs/first/{what}")
        assert refused.status_code == 422
        assert "'first'" in refused.json()["detail"]
    again = work.post("runs", {"name": "first", "recipe": work.recipe()})
    assert again.status_code == 422
    assert again.json()["detail"] == "there is a run 'first' already: choose another name."


def test_lab_work_a_run_stops_with_its_step_waits_its_turn_and_goes_on(work: Work):
    assert work.post("runs", {"name": "long", "recipe": work.recipe(LONG)}).json()["state"] == "running"
    assert work.post("runs", {"name": "next", "recipe": work.recipe(2)}).json()["state"] == "waiting"
    assert "already" in work.post("runs", {"name": "next", "recipe": work.recipe(2)}).json()["detail"]
    work.until("long", lambda run: run["step"] >= 3)
    other = Runs(work.runs)  # a lab that is opened again while the process trains
    assert other.state("long")["state"] == "running"
    assert work.get("runs/next").json()["state"] == "waiting"
    assert work.post("runs/long/stop").status_code == 200
    stopped = work.ended("long")
    assert (stopped["state"], stopped["sentence"]) == ("stopped", "It goes on from its last checkpoint.")
    assert work.ended("next")["state"] == "done", "it began when the other one ended"
    kept = sorted(p.name for p in (work.runs / "long" / "checkpoints").iterdir())
    assert kept == [f"{stopped['step']:08d}"], "the step at which it stopped"
    assert work.post("runs/long/resume").status_code == 200
    going = work.until("long", lambda run: run["step"] > stopped["step"] + 2)
    assert going["state"] == "running"
    steps = [point["step"] for point in work.get("compare?runs=long").json()["runs"][0]["steps"]]
    assert steps == list(range(1, len(steps) + 1)), "no step is lost or told twice"
    os.kill(work.pid("long"), signal.SIGKILL)
    killed = work.ended("long")
    assert killed["state"] == "stopped"
    assert killed["sentence"] == "Its process was killed. It goes on from its last checkpoint."
    assert Runs(work.runs).state("long")["state"] == "stopped", "a lab that did not begin it says so too"
    assert work.post("runs/long/resume").json()["state"] == "running"
    work.until("long", lambda run: run["step"] > stopped["step"])


LAB = """
import json, sys, time
from pathlib import Path
from deltaw.lab.runs import Runs
runs = Runs(Path(sys.argv[1]))
for name, recipe in json.loads(sys.argv[2]).items():
    runs.start(name, recipe)
print("begun", flush=True)
time.sleep(600)
"""


def test_lab_work_runs_that_waited_when_the_lab_was_killed_wait_again(work: Work, tiny: Bench):
    asked = {"long": work.recipe(LONG), "gone": work.recipe(2), "next": work.recipe(2), "last": work.recipe(3)}
    words = [sys.executable, "-c", LAB, str(work.runs), json.dumps(asked)]
    lab = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert lab.stdout is not None
    with lab.stdout as said:
        assert said.readline() == "begun\n"
    second = make_app(tiny.lab, desk=desk_in(work.runs))  # beside it: it leaves the first one's queue alone
    seen = TestClient(second, base_url=HERE).get("/api/work/runs/next").json()
    assert seen["state"] == "stopped"
    lab.kill()
    lab.wait()
    (work.runs / "recipes" / "gone.yaml").unlink()
    after = TestClient(make_app(tiny.lab, desk=desk_in(work.runs)), base_url=HERE, headers={"origin": HERE})
    states = {run["name"]: run["state"] for run in after.get("/api/work/runs").json()["runs"]}
    assert states == {"long": "running", "next": "waiting", "last": "waiting"}
    assert after.get("/api/work/runs/last").json()["sentence"].endswith("and 1 before it.")
    assert after.post("/api/work/runs/next/stop", json={}).json()["state"] == "stopped"
    assert json.loads((work.runs / "recipes" / "queue.json").read_text()) == ["last"]
    assert after.post("/api/work/runs/long/stop", json={}).status_code == 200
    assert work.ended("long")["state"] == "stopped"
    done = work.until("last", lambda run: run["state"] == "done")
    assert done["step"] == 3
    assert json.loads((work.runs / "recipes" / "queue.json").read_text()) == []


@pytest.mark.parametrize("damaged", ["", "{", "7", '{"a": 1}', '["absent", 3, "../x"]'])
def test_lab_work_a_damaged_queue_holds_nobody_up(work: Work, tiny: Bench, damaged: str):
    recipes = work.runs / "recipes"
    recipes.mkdir()
    (recipes / "queue.json").write_text(damaged)
    opened = TestClient(make_app(tiny.lab, desk=desk_in(work.runs)), base_url=HERE)
    assert opened.get("/api/work/runs").json()["runs"] == []


def test_lab_work_a_run_that_fails_says_why(work: Work):
    recipe = work.recipe() | {"adapter": {"method": "lora", "targets": ["q_porj"]}}
    assert work.post("runs", {"name": "wrong", "recipe": recipe}).status_code == 200
    failed = work.ended("wrong")
    assert failed["state"] == "failed"
    assert "q_porj" in failed["sentence"]
    assert "q_proj" in failed["sentence"]
    assert Runs(work.runs).state("wrong")["state"] == "failed", "the log tells it to every lab"


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".hidden", "data", "registry", "recipes", "x" * 65, "a b"])
def test_lab_work_a_name_that_is_no_plain_name_is_refused(work: Work, name: str):
    before = sorted(work.runs.rglob("*"))
    answer = work.post("runs", {"name": name, "recipe": work.recipe()})
    assert answer.status_code == 422
    assert "cannot be called" in answer.json()["detail"]
    assert sorted(work.runs.rglob("*")) == before
    assert not (work.runs.parent / "out").exists()


@pytest.mark.parametrize("path", ["runs/absent", "runs/..%2Fruns", "runs/absent/events", "compare?runs=absent,x"])
def test_lab_work_a_run_that_is_not_there_is_404(work: Work, path: str):
    answer = work.get(path)
    assert answer.status_code == 404, answer.text


def test_lab_work_another_site_can_begin_and_stop_nothing(work: Work):
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        for path, body in (
            ("runs", {"name": "x", "recipe": work.recipe()}),
            ("data", {"name": "x.jsonl", "text": "{}"}),
            ("runs/x/stop", {}),
            ("runs/x/resume", {}),
            ("train/plan", {"recipe": {}}),
        ):
            refused = work.client.post(f"/api/work/{path}", json=body, headers=headers)
            assert refused.status_code == 403, (path, headers)
    assert work.get("runs").json()["runs"] == []


def test_lab_work_runs_are_compared_by_curves_and_settings_that_differ(work: Work):
    for name, rank in (("low", 2), ("high", 4)):
        recipe = work.recipe(3)
        recipe["adapter"]["rank"] = rank
        list(train(recipe, work.runs / name))
    found = work.get("compare?runs=low,high").json()
    assert found["differ"] == [{"key": "adapter.rank", "values": [2, 4]}]
    for run in found["runs"]:
        events = [json.loads(line) for line in (work.runs / run["name"] / "metrics.jsonl").read_text().splitlines()]
        steps = [e for e in events if e["event"] == "step"]
        assert [p["loss"] for p in run["steps"]] == [e["loss"] for e in steps]
        assert [p["tokens"] for p in run["steps"]] == [sum(e["tokens"] for e in steps[: i + 1]) for i in range(3)]
        assert run["loss"] == steps[-1]["loss"]
    assert work.get("compare?runs=").status_code == 422
    assert work.get("compare?runs=" + ",".join(f"r{i}" for i in range(9))).status_code == 422


def test_lab_work_a_terminals_run_is_shown_but_not_touched(work: Work):
    events = train(work.recipe(LONG), work.runs / "mine")
    for _, event in zip(range(4), events, strict=False):
        assert event.kind in ("start", "step")
    run = work.get("runs/mine").json()
    assert (run["state"], run["mine"], run["step"]) == ("running", False, 3)
    assert "begun in a terminal" in work.post("runs/mine/stop").json()["detail"]
    events.close()
    assert work.get("runs/mine").json()["state"] == "stopped"
    assert "begun elsewhere" in work.post("runs/mine/resume").json()["detail"]


def lines(tail: Tail) -> list[int]:
    return [json.loads(text)["step"] for _, text in tail.read()[1]]


def test_lab_work_a_tail_goes_on_after_an_id_and_begins_again_after_a_cut(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    event = {"event": "step", "tokens": 3, "seconds": 0.5}
    told = [json.dumps({**event, "step": n, "loss": 1 / n}) + "\n" for n in range(1, 8)]
    path.write_text("".join(told[:3]) + told[3][:5])
    again, found = tail.read()
    assert (again, [json.loads(text)["step"] for _, text in found]) == (False, [1, 2, 3])
    path.write_text("".join(told[:4]))
    assert lines(tail) == [4]
    assert lines(Tail(path, found[1][0])) == [3, 4], "from an id on"
    assert lines(Tail(path, "nonsense")) == [1, 2, 3, 4]
    path.write_text(
        "".join(told[:2]) + json.dumps(event | {"step": 33}) + "\n" + "".join(told[3:])
    )  # cut back, and longer again
    again, found = tail.read()
    assert again
    assert [json.loads(text)["step"] for _, text in found] == [1, 2, 33, 4, 5, 6, 7]


def test_lab_work_events_are_streamed_with_ids_and_the_state(work: Work):
    list(train(work.recipe(), work.runs / "first"))

    async def first(last_id: str) -> str:
        told = told_events(Runs(work.runs), "first", work.runs / "first" / "metrics.jsonl", last_id)
        text = await anext(told)
        await told.aclose()
        return text

    blocks = asyncio.run(first("")).strip().split("\n\n")
    events = [json.loads(b.partition("data: ")[2]) for b in blocks]
    assert [e["event"] for e in events] == ["start", *["step"] * 4, "done", "state"]
    assert events[-1]["state"] == "done"
    at = blocks[2].split("\n")[0].removeprefix("id: ")
    later = asyncio.run(first(at)).strip().split("\n\n")
    assert [json.loads(b.partition("data: ")[2])["event"] for b in later] == [*["step"] * 2, "done", "state"]
