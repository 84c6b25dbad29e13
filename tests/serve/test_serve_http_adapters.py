"""Promotion, loading, unloading and residency while requests run."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time

import httpx
import pytest
from made_servers import ADMIN, Made, running, save_adapter

from deltaw.errors import AdapterError
from deltaw.methods import Lora
from deltaw.serve.keys import hash_key
from deltaw.serve.server import greeting
from deltaw.serve.settings import ServerSettings
from deltaw.store.registry import Registry

GREEDY = {"prompt": "the quick", "max_tokens": 8, "temperature": 0}


@pytest.fixture
def own(made, tmp_path):
    """A registry and folders that a test may change."""
    shutil.copytree(made.registry, tmp_path / "registry")
    shutil.copytree(made.loose, tmp_path / "loose")
    return Made(made.base, tmp_path / "registry", tmp_path / "loose", made.foreign)


def say(client, model: str) -> str:
    answer = client.post("/v1/completions", json={**GREEDY, "model": model})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def test_serve_http_promotion_counts_from_the_next_request(own):
    registry = Registry(own.registry)
    with running(own) as server, server.client() as client:
        old, new = say(client, "support@1"), say(client, "support@2")
        assert old != new
        assert say(client, "support") == old
        registry.promote("support@2")
        assert say(client, "support") == new
        registry.rollback("support")
        assert say(client, "support") == old


def test_serve_http_says_which_adapter_the_bases_name_hides(own):
    with running(own) as server:
        serving = server.app.state.serving
        assert len(greeting("127.0.0.1", 80, serving)) == 1
        Registry(own.registry).add("tiny", own.loose / "v2")
        assert greeting("127.0.0.1", 80, serving)[0].startswith("the registry's adapter 'tiny' cannot be asked for")


def test_serve_http_running_requests_keep_their_version(own):
    registry = Registry(own.registry)
    with running(own) as server, server.client() as client:
        body = {"model": "support", "prompt": "the quick", "temperature": 0, "max_tokens": 300, "ignore_eos": True}
        before = client.post("/v1/completions", json=body).json()
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            registry.promote("support@2")
            with server.client() as other:
                assert other.post("/v1/completions", json={**body, "max_tokens": 1}).json()["model"] == "support@2"
            rest = [first, *(line for line in lines if line)]
        pieces = [json.loads(line.removeprefix("data: ")) for line in rest if "[DONE]" not in line]
        assert {piece["model"] for piece in pieces} == {"support@1"}
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == before["choices"][0]["text"]


def test_serve_http_admin_loads_and_unloads(own):
    settings = ServerSettings(admin_sha256=hash_key(ADMIN), adapter_roots=(own.loose,))
    with running(own, settings) as server, server.client(ADMIN) as client:
        load = {"lora_name": "extra", "lora_path": "v2"}
        done = client.post("/v1/load_lora_adapter", json=load)
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'extra' added successfully.")
        assert say(client, "extra") == say(client, "support@2")
        assert "extra" in {model["id"] for model in client.get("/v1/models").json()["data"]}
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 400
        again = {**load, "lora_path": str(own.loose / "v1"), "load_inplace": True}
        assert client.post("/v1/load_lora_adapter", json=again).status_code == 200
        assert say(client, "extra") == say(client, "support@1")
        for name in ("support", "tiny"):
            assert client.post("/v1/load_lora_adapter", json={**load, "lora_name": name}).status_code == 400
            assert client.post("/v1/unload_lora_adapter", json={"lora_name": name}).status_code in (400, 404)
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "extra"}).status_code == 200
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "extra"}).status_code == 404
        assert client.post("/v1/completions", json={**GREEDY, "model": "extra"}).status_code == 404


def test_serve_http_loading_is_jailed(own, tmp_path):
    settings = ServerSettings(admin_sha256=hash_key(ADMIN), adapter_roots=(own.loose,))
    outside = save_adapter(own.base, tmp_path / "outside", Lora(rank=2, alpha=3), seed=5)
    (own.loose / "link").symlink_to(outside)
    (own.loose / "file").mkdir()
    for name in ("adapter_config.json", "deltaw.json"):
        shutil.copy(outside / name, own.loose / "file" / name)
    (own.loose / "file" / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    paths = ["../outside", str(outside), "link", "file", "/", "..", "v1/../../outside", "v1\0", "hf://owner/repo",
             "https://example.org/adapter", "owner/repo", "~", "s3://bucket/key", "x" * 4000]  # fmt: skip
    with running(own, settings) as server, server.client(ADMIN) as client:
        for path in paths:
            answer = client.post("/v1/load_lora_adapter", json={"lora_name": "bad", "lora_path": path})
            assert answer.status_code == 404, path
            assert str(tmp_path) not in answer.text.replace(path, "")
        assert "bad" not in {model["id"] for model in client.get("/v1/models").json()["data"]}
        good = {"lora_name": "good", "lora_path": "v1/../v2"}  # inside, whatever way it takes
        assert client.post("/v1/load_lora_adapter", json=good).status_code == 200
        other = {"lora_name": "bad", "lora_path": str(own.registry / "objects")}
        assert client.post("/v1/load_lora_adapter", json=other).status_code == 404


def test_serve_http_admin_routes_need_the_admin_key(own, http):
    body = {"lora_name": "x", "lora_path": "v1"}
    with running(own) as server, server.client(ADMIN) as client:
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 404
        assert "/v1/load_lora_adapter" not in client.get("/openapi.json").json()["paths"]
    with http.client("some-other-key-of-no-use") as client:
        assert client.post("/v1/load_lora_adapter", json=body).status_code == 401
    with http.client() as client:
        assert client.post("/v1/unload_lora_adapter", json=body).status_code == 401


def test_serve_http_a_damaged_adapter_is_refused_and_tells_no_path(own):
    folder = Registry(own.registry).folder("support@2")
    file = folder / "adapter_model.safetensors"
    file.chmod(0o600)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with running(own) as server, server.client() as client:
        answer = client.post("/v1/completions", json={**GREEDY, "model": "support@2"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapter_unusable")
        assert str(own.registry) not in answer.text
        assert say(client, "support@1")
        assert server.idle()


def test_serve_http_many_adapters_share_a_small_budget(own):
    registry = Registry(own.registry)
    names = [f"small{i}" for i in range(12)]
    for i, name in enumerate(names):
        registry.add(name, save_adapter(own.base, own.loose / name, Lora(rank=2, alpha=3), seed=20 + i))
    one = sum(t.nbytes for t in _tensors(own, "small0"))
    with running(own, active_bytes=3 * one, host_bytes=5 * one) as server:
        with server.client() as client:
            wanted = {name: say(client, name) for name in names}
        assert len(set(wanted.values())) > 6
        found, problems = [], []

        def ask(worker: int) -> None:
            with server.client() as client:
                for step in range(24):
                    name = names[(worker * 5 + step * (worker + 1)) % len(names)]
                    try:
                        found.append(say(client, name) == wanted[name])
                    except Exception as problem:
                        problems.append(problem)

        workers = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not problems
        assert found == [True] * 144
        assert server.idle()
        residency = server.served.residency
        assert residency.active.bytes <= 3 * one
        assert residency.host.bytes <= 5 * one
        assert residency.active.evictions > 12
        assert set(server.served.engine.names()) == set(residency.active.items)


def _tensors(own: Made, name: str):
    from deltaw.store.peft import read_adapter

    return read_adapter(own.loose / name).tensors().values()


def test_serve_http_a_load_that_fails_gives_its_room_back(own, monkeypatch):
    one = sum(t.nbytes for t in _tensors(own, "v1"))
    with running(own, active_bytes=3 * one) as server, server.client() as client:
        runner = server.served.engine._runner
        add = runner.add
        monkeypatch.setattr(runner, "add", lambda key, resident, ready: _refuse())
        answers = [client.post("/v1/completions", json={**GREEDY, "model": "support@1"}) for _ in range(4)]
        assert [a.json()["error"]["code"] for a in answers] == ["adapter_unusable"] * 4
        assert server.idle()
        assert server.served.residency.active.bytes == 0
        assert server.served.engine.names() == []
        monkeypatch.setattr(runner, "add", add)
        assert say(client, "support@1")
        assert server.served.residency.active.bytes == one


def _refuse() -> None:
    raise AdapterError("it does not go in")


def test_serve_http_an_adapter_beyond_the_budget_is_refused(own):
    with running(own, active_bytes=100) as server, server.client() as client:
        answer = client.post("/v1/completions", json={**GREEDY, "model": "support"})
        assert answer.status_code == 400
        assert "--adapters-mb" in answer.json()["error"]["message"]
        assert server.idle()


def test_serve_http_loading_stalls_no_running_request(own, monkeypatch):
    """A read that takes as long as it likes holds up nobody but those who asked for that adapter."""
    hold, reads = threading.Event(), []
    with running(own) as server, server.client() as client:
        folder = server.served.registry.folder
        monkeypatch.setattr(
            server.served.registry, "folder", lambda ref: (reads.append(ref), hold.wait(20), folder(ref))[-1]
        )
        waiting = [threading.Thread(target=lambda: say(server.client(), "support@2")) for _ in range(3)]
        for thread in waiting:
            thread.start()
        until = time.monotonic() + 10
        while not reads and time.monotonic() < until:
            time.sleep(0.01)
        assert say(client, "tiny")  # answered while the read stands
        assert all(thread.is_alive() for thread in waiting)
        hold.set()
        for thread in waiting:
            thread.join(10)
        assert reads == ["support@2"]  # three asked, one read
        assert server.idle()


def test_serve_http_a_client_that_leaves_during_a_load_holds_nothing(own, monkeypatch):
    hold = threading.Event()
    with running(own) as server:
        folder = server.served.registry.folder
        monkeypatch.setattr(server.served.registry, "folder", lambda ref: (hold.wait(20), folder(ref))[-1])

        async def leave() -> None:
            async with httpx.AsyncClient(base_url=server.url) as client:
                with pytest.raises(httpx.ReadTimeout):
                    await client.post("/v1/completions", json={**GREEDY, "model": "support"}, timeout=0.3)

        asyncio.run(leave())
        hold.set()
        assert server.idle()
