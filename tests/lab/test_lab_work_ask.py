"""The playground: one prompt, the base and several adapters, in the steps of one real engine."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from desk_bench import HERE, SAME, exact_lab, filled, noise, real_run
from fastapi.testclient import TestClient
from lab_bench import Bench

from deltaw.core.adapter import Adapter
from deltaw.data.source import Row
from deltaw.data.template import prompt_ids
from deltaw.lab import work_ask
from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk
from deltaw.lab.playground import Asked, Playground
from deltaw.lab.server import make_app
from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.store import objects
from deltaw.store.registry import Registry
from deltaw.train.evaluate import data_spec

PROMPT = "Colour of snow?"


@pytest.fixture(scope="module")
def desk(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    root = tmp_path_factory.mktemp("desk")
    return filled(tiny_folder, root, real_run(tiny_folder, root / "run"))


@pytest.fixture(scope="module")
def lab(tiny_folder: Path, desk: Desk) -> Lab:
    """A lab with an adapter that it was given."""
    return exact_lab(tiny_folder, mine=desk.runs / "first")


@pytest.fixture(scope="module")
def client(lab: Lab, desk: Desk) -> Iterator[TestClient]:
    with TestClient(make_app(lab, desk=desk), base_url=HERE) as opened:
        yield opened


def ask(client: TestClient, *adapters: str, **settings: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Events of one prompt, and the text of each column."""
    body = {"prompt": PROMPT, "adapters": adapters, "max_tokens": 12, **settings}
    answer = client.post("/api/work/ask", json=body, headers=SAME)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    columns = range(len(adapters))
    texts = [whole("".join(e.get("text", "") for e in events if e.get("column") == i)) for i in columns]
    return events, texts


def alone(base: Path, adapter: Adapter | Path | None, n: int = 12) -> str:
    """What `deltaw generate` answers."""
    model = load_base(base, dtype="float32")
    row, spec = Row(prompt=PROMPT, completion="", source="x"), data_spec(model, None, 99)
    ids = prompt_ids(row, model.tokenizer, spec, model.task)
    if adapter is not None:
        model.attach(adapter, "it")
    return whole(str(model.tokenizer.decode(generate(model, [ids], n)[0], skip_special_tokens=True)))


def whole(text: str) -> str:
    """Without half characters at the end, which a stream holds back."""
    return text.rstrip("\ufffd")


def test_lab_work_ask_each_column_is_what_generate_says_and_all_share_steps(
    client: TestClient, desk: Desk, tiny_folder: Path
):
    who = ("base", "registry:support@2", "run:first", "given:mine", "registry:child")
    events, texts = ask(client, *who)
    registry = Registry(desk.registry)
    folders = [None, registry.folder("support@2"), desk.runs / "first", desk.runs / "first", registry.folder("child")]
    assert texts == [alone(tiny_folder, f) for f in folders]
    assert len(set(texts)) >= 4, "answers that differ: what is right cannot be luck"
    start, done = events[0], events[-1]
    assert [c["name"] for c in start["columns"]] == ["base", "support@2", "first", "mine", "child@1"]
    assert [c["problem"] for c in start["columns"]] == [None] * 5
    assert done["event"] == "done"
    assert done["together"] == 5, "rows of one step"
    assert sum(e["event"] == "token" for e in events) > 5, "token by token"


def test_lab_work_ask_a_promotion_counts_from_the_next_answer_on(client: TestClient, desk: Desk):
    registry = Registry(desk.registry)
    before, one = ask(client, "registry:support")
    registry.promote("support@2")
    after, two = ask(client, "registry:support")
    registry.rollback("support")
    assert [e[0]["columns"][0]["name"] for e in (before, after)] == ["support@1", "support@2"]
    assert one != two


def test_lab_work_ask_seed_and_temperature(client: TestClient):
    _, hot = ask(client, "base", "base", temperature=1.5, seed=7)
    _, again = ask(client, "base", temperature=1.5, seed=7)
    _, other = ask(client, "base", temperature=1.5, seed=8)
    assert hot[0] == hot[1] == again[0] != other[0]


def test_lab_work_ask_a_column_that_cannot_answer_says_why_and_the_others_answer(
    client: TestClient, desk: Desk, tiny_folder: Path
):
    with pytest.MonkeyPatch.context() as before:  # kept when nobody looked for NaN yet
        before.setattr(objects, "not_finite", lambda tensors: [])
        Registry(desk.registry).add("broken", noise(tiny_folder, 5, size=float("nan")))
    who = ("registry:far", "registry:broken", "registry:nobody", "run:../first", "x", "base")
    events, texts = ask(client, *who)
    ends = {e["column"]: e["error"] for e in events if e["event"] == "end"}
    assert "The adapter was trained on another base." in ends[0]
    assert "Other-7B" in ends[0]
    assert "holds NaN or Inf" in ends[1]
    assert "No adapter is called 'nobody'" in ends[2]
    assert "there is no run '../first'" in ends[3]
    assert "says no adapter" in ends[4]
    assert ends[5] is None
    assert texts[:5] == [""] * 5
    assert texts[5] == alone(tiny_folder, None)


def test_lab_work_ask_without_a_template_a_chat_is_refused_in_a_sentence(client: TestClient):
    events, _ = ask(client, "base", chat=True)
    assert "chat template" in events[-2]["error"]
    assert client.get("/api/work/ask/choices").json()["has_template"] is False


def test_lab_work_ask_choices_name_all_that_can_be_asked(client: TestClient):
    told = client.get("/api/work/ask/choices?search=SUPP").json()
    assert [r["name"] for r in told["registry"]] == ["support"]
    assert (told["runs"], told["given"]) == (["first"], ["mine"])
    fits = {r["name"]: r["fits"] for r in client.get("/api/work/ask/choices").json()["registry"]}
    assert (fits["far"], fits["support"]) == ("no", "yes")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": ""}, "Prompt.prompt"),
        ({"adapters": []}, "Prompt.adapters"),
        ({"adapters": ["base"] * 7}, "Prompt.adapters"),
        ({"temperature": -1}, "Prompt.temperature"),
        ({"max_tokens": 10**9}, "Prompt.max_tokens"),
        ({"path": "/etc"}, "unknown setting 'path'"),
    ],
)
def test_lab_work_ask_wrong_settings_are_422(client: TestClient, given: dict[str, object], words: str):
    body = {"prompt": "x", "adapters": ["base"], **given}
    answer = client.post("/api/work/ask", json=body, headers=SAME)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert client.post("/api/work/ask", json=body, headers={"origin": "http://evil.example"}).status_code == 403


def test_lab_work_ask_too_long_a_prompt_is_the_engines_sentence(client: TestClient):
    events, _ = ask(client, "base", prompt="x" * 300)
    assert "there is room for" in events[-2]["error"]


def test_lab_work_ask_and_the_pictures_leave_each_other_alone(client: TestClient, lab: Lab, tiny_folder: Path):
    before = {k: v.clone() for k, v in lab.model.net.state_dict().items()}
    wanted = alone(tiny_folder, None)
    stop, failed = threading.Event(), []

    def train() -> None:
        step = 1
        while not stop.is_set():
            answer = client.post("/api/pictures/9", json={"step": step, "rank": 2}, headers=SAME)
            failed.extend([] if answer.status_code == 200 else [answer.text])
            step = step % 20 + 1

    worker = threading.Thread(target=train)
    worker.start()
    try:
        texts = [ask(client, "base", "run:first")[1][0] for _ in range(4)]
    finally:
        stop.set()
        worker.join()
    assert texts == [wanted] * 4
    assert failed == []
    lab.model.use(None)
    now = lab.model.net.state_dict()
    assert all(torch.equal(now[k], v) for k, v in before.items())


async def _told(playground: Playground, *adapters: str) -> list[dict[str, Any]]:
    return [e async for e in playground.answer(Asked(PROMPT, adapters, 6, 0.0, 0, False))]


def test_lab_work_ask_adapters_leave_so_that_memory_is_bounded(lab: Lab, desk: Desk, tiny_folder: Path):
    registry = Registry(desk.registry)
    size = sum(t.numel() * t.element_size() for t in noise(tiny_folder, 1).tensors().values())
    playground = Playground(lab, desk, adapter_bytes=2 * size)
    for n in range(5):
        registry.add(f"many-{n}", noise(tiny_folder, 20 + n))

    async def work() -> None:
        names = [f"registry:many-{n}" for n in range(5)]
        two = await asyncio.gather(*(_told(playground, names[i], names[(i + 1) % 5]) for i in range(5)))
        assert all(told[-1]["event"] == "done" and told[-1]["together"] >= 2 for told in two)
        residency = playground.served().residency
        assert residency.active.bytes <= 2 * size
        assert residency.active.evictions >= 3
        assert len(playground.served().engine.names()) <= 2
        too_many = await _told(playground, *names[:3])
        assert "ask fewer at once" in str(too_many[0]["columns"][2]["problem"])
        assert too_many[0]["columns"][1]["problem"] is None

    asyncio.run(work())
    playground.close()


def test_lab_work_ask_who_leaves_ends_the_answers(tiny: Bench, desk: Desk, monkeypatch: pytest.MonkeyPatch):
    there: list[Playground] = []

    def noted(*given: Any) -> Playground:
        there.append(Playground(*given))
        return there[-1]

    monkeypatch.setattr(work_ask, "Playground", noted)
    app = make_app(tiny.lab, desk=desk)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    made = there[0].served()
    run = made.engine._runner.run
    made.engine._runner.run = lambda batch: (time.sleep(0.02), run(batch))[1]  # 4 s to its end: nobody waits so long
    body = json.dumps({"prompt": "x", "adapters": ["base"], "max_tokens": 200, "temperature": 1})
    head = f"POST /api/work/ask HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port)) as wire:
        wire.sendall((head + body).encode())
        seen = b""
        while b'"token"' not in seen:
            seen += wire.recv(4096)
    until = time.monotonic() + 20
    while made.engine.stats().running and time.monotonic() < until:
        time.sleep(0.02)
    assert made.engine.stats().running == 0
    assert made.engine.stats().tokens_total < 200, "it did not run to its end"
    server.should_exit = True
    thread.join(10)
    assert not made.engine.is_alive, "the engine ends with the lab"
