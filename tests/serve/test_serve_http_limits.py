"""Keys, queues, deadlines, vanished clients, and the end of a server."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
from made_servers import running

from deltaw.errors import NotFound, ServeError
from deltaw.serve.hosts import hosts_of, is_loopback
from deltaw.serve.keys import add_key, hash_admin_key, read_keys, remove_key
from deltaw.serve.limits import Admission
from deltaw.serve.logs import JsonLines, Lines
from deltaw.serve.server import greeting
from deltaw.serve.settings import ServerSettings

LONG = {"model": "tiny", "prompt": "abc", "max_tokens": 450, "temperature": 0, "ignore_eos": True}


def test_serve_http_keys_are_kept_as_hashes_and_refused_by_name(tmp_path):
    path = tmp_path / "keys.json"
    key, secret = add_key(path, "team", ("support",), 3)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    assert len(secret) > 40
    assert read_keys(path) == (key,)
    with pytest.raises(ServeError, match="already"):
        add_key(path, "team")
    with pytest.raises(ServeError, match="name is letters"):
        add_key(path, "a team")
    with pytest.raises(NotFound, match="team"):
        remove_key(path, "tema")
    remove_key(path, "team")
    assert read_keys(path) == ()
    for text in ("[]", "{", '{"keys": [{"name": "a"}]}', '{"keys": [{"name": "a", "sha256": "x"}]}'):
        path.write_text(text)
        with pytest.raises(ServeError):
            read_keys(path)
    with pytest.raises(ServeError, match="20 or more"):
        hash_admin_key("short")


def test_serve_http_keys_open_what_they_name(made, tmp_path):
    path = tmp_path / "keys.json"
    secrets = {name: add_key(path, name, models)[1] for name, models in {"all": ("*",), "one": ("support",)}.items()}
    settings = ServerSettings(keys_file=path)
    ask = {"prompt": "a", "max_tokens": 1}
    with running(made, settings) as server:
        for key in (None, "dw-wrong", secrets["one"][:-1]):
            with server.client(key) as client:
                answer = client.post("/v1/completions", json={**ask, "model": "tiny"})
                assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
                assert client.get("/v1/models").status_code == 401
                assert client.get("/openapi.json").status_code == 401
                assert client.get("/health").status_code == client.get("/metrics").status_code == 200
        with server.client(secrets["one"]) as client:
            assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["support"]
            assert client.post("/v1/completions", json={**ask, "model": "support@2"}).status_code == 200
            unknown = client.post("/v1/completions", json={**ask, "model": "nobody"}).json()
            for model in ("tiny", "", "legal"):
                answer = client.post("/v1/completions", json={**ask, "model": model})
                assert answer.status_code == 404
                assert answer.json()["error"] | {"message": ""} == unknown["error"] | {"message": ""}
        with server.client(secrets["all"]) as client:
            assert client.post("/v1/completions", json={**ask, "model": "legal"}).status_code == 200
            time.sleep(0.02)  # a file's time has a grain
            remove_key(path, "all")
            assert client.get("/v1/models").status_code == 401  # at once
            path.write_text("broken")
        with server.client(secrets["one"]) as client:
            assert client.get("/v1/models").status_code == 200  # a broken file changes nothing


def busy(server, n: int, key: str | None = None):
    """Start `n` long streams and wait until they run; returns their client, and what keeps them open."""
    client = server.client(key)
    streams = [client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) for _ in range(n)]
    answers = [stream.__enter__() for stream in streams]
    lines = [answer.iter_lines() for answer in answers]
    for answer, own in zip(answers, lines, strict=True):
        assert answer.status_code == 200
        next(own)
    return client, (streams, lines)


def test_serve_http_a_full_queue_says_when_to_come_again(made):
    settings = ServerSettings(max_sequences=2, max_queue=1)
    with running(made, settings, step_s=0.01) as server:
        client, _open = busy(server, 2)
        with server.client() as other:
            assert other.post("/v1/completions", json={**LONG, "n": 2}).status_code == 429
            full = other.post("/v1/completions", json={**LONG, "n": 3})
            assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
            assert int(full.headers["retry-after"]) >= 1
            assert other.post("/v1/completions", json={**LONG, "n": 4}).status_code == 400  # never fits
            client.close()  # both clients vanish
            assert server.idle()
            assert other.post("/v1/completions", json={**LONG, "max_tokens": 2, "n": 3}).status_code == 200
        assert "deltaw_cancelled_total 2.0" in httpx.get(f"{server.url}/metrics").text


def test_serve_http_a_keys_share_is_bounded(made, tmp_path):
    path = tmp_path / "keys.json"
    small, large = add_key(path, "small", max_concurrent=1)[1], add_key(path, "large")[1]
    with running(made, ServerSettings(keys_file=path), step_s=0.01) as server:
        client, _open = busy(server, 1, small)
        ask = {**LONG, "max_tokens": 1}
        with server.client(small) as again, server.client(large) as other:
            answer = again.post("/v1/completions", json=ask)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "key_limit")
            assert "retry-after" in answer.headers
            assert other.post("/v1/completions", json=ask).status_code == 200
            client.close()
            assert server.idle()
            assert again.post("/v1/completions", json=ask).status_code == 200


def test_serve_http_vanished_clients_of_whole_answers_free_their_slots(made):
    with running(made, step_s=0.02) as server:  # 9 s to the answer's end
        with server.client() as client, pytest.raises(httpx.ReadTimeout):
            client.post("/v1/completions", json=LONG, timeout=0.15)
        began = time.monotonic()
        assert server.idle()
        assert server.served.engine.stats().running == 0
        assert time.monotonic() - began < 5


def test_serve_http_a_reader_that_stands_still_is_let_go(made):
    settings = ServerSettings(send_s=0.3)
    with running(made, settings, kv_mb=32) as server:
        body = json.dumps({**LONG, "prompt": ["a"] * 60, "stream": True, "logprobs": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            slow.sendall(head.encode() + body)
            until = time.monotonic() + 10
            while not server.app.state.serving.admission.sequences and time.monotonic() < until:
                time.sleep(0.001)
            assert server.idle(20)  # nothing was read, and nothing is held
            metrics = httpx.get(f"{server.url}/metrics").text
            made_tokens = float(metrics.split('deltaw_tokens_total{kind="output"} ')[1].split()[0])
            assert made_tokens < 60 * LONG["max_tokens"]  # it was cancelled, not finished


def raw(http, data: bytes, wait_s: float, then: bytes = b"") -> tuple[bytes, float]:
    """What the server says to some bytes, and when it closes the connection (seconds)."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", int(http.url.rpartition(":")[2])), timeout=wait_s) as connection:
        connection.sendall(data)
        found = connection.recv(65536) if then else b""
        connection.sendall(then)
        while part := connection.recv(65536):
            found += part
    return found, time.monotonic() - began


def test_serve_http_slow_headers_and_bodies_are_cut_off(http):
    for data in (b"", b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ", b"POST /v1/completions HTTP/1.1\r\n"):
        said, took_s = raw(http, data, 8)
        assert said == b""
        assert took_s < 5
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    said, took_s = raw(http, head, 8)
    assert said.startswith(b"HTTP/1.1 408")
    assert took_s < 5
    said, took_s = raw(http, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", 8, b"GET /heal")  # and no more of it
    assert said.startswith(b"HTTP/1.1 200")
    assert took_s < 5


def test_serve_http_connections_are_bounded(made):
    with running(made, ServerSettings(max_connections=3)) as server:
        port = int(server.url.rpartition(":")[2])
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        time.sleep(0.1)
        assert raw(server, b"", 5)[1] < 2  # closed at once, long before the wait for headers ends
        for connection in held:
            connection.close()
        time.sleep(0.1)
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_serve_http_bodies_have_a_limit(http):
    with http.client() as client:
        big = json.dumps({"model": "tiny", "prompt": "a" * (2 * 2**20)})
        answer = client.post("/v1/completions", content=big, headers={"Content-Type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")

        def pieces():
            for _ in range(40):
                yield b" " * 65536

        chunked = client.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
        assert chunked.status_code == 413
        assert client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def test_serve_http_request_ids_come_back(http):
    with http.client() as client:
        assert client.get("/health", headers={"X-Request-ID": "abc-1.2_3"}).headers["x-request-id"] == "abc-1.2_3"
        for odd in ("a b", "x" * 65, "a\u00e9".encode()):
            found = client.get("/health", headers={"X-Request-ID": odd}).headers["x-request-id"]
            assert len(found) == 32
        refused = client.post("/v1/completions", json={"model": "tiny"}, headers={"X-Request-ID": "q"})
        assert refused.headers["x-request-id"] == "q"


def test_serve_http_room_is_counted_and_given_back_once():
    admission = Admission(ServerSettings(max_sequences=4, max_queue=4))
    place = admission.enter(None, 5)
    assert admission.sequences == 5
    place.release(2.0)
    place.release(2.0)
    assert admission.sequences == 0
    assert [is_loopback(h) for h in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "0.0.0.0", "10.0.0.1", "box")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip


def test_serve_http_a_server_says_who_can_reach_it(made, tmp_path, http):
    from deltaw.cli.serve import require_extra

    serving = http.app.state.serving
    assert greeting("127.0.0.1", 80, serving) == ["serving tiny at http://127.0.0.1:80/v1"]
    assert "WITHOUT A KEY" in greeting("0.0.0.0", 80, serving)[0]
    assert greeting("::1", 80, serving) == ["serving tiny at http://[::1]:80/v1"]
    with pytest.raises(ServeError, match=r"no_such_package.*deltaw\[serve\]"):
        require_extra(("json", "no_such_package"))


def test_serve_http_names_of_others_are_not_answered(made):
    hosts = hosts_of("127.0.0.1", ["Box.local"], has_keys=False)
    assert hosts_of("127.0.0.1", [], has_keys=True) is None
    assert hosts_of("0.0.0.0", [], has_keys=False) is None
    with running(made, ServerSettings(hosts=hosts)) as server, server.client() as client:
        for good in ("127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "box.local"):
            assert client.get("/v1/models", headers={"Host": good}).status_code == 200, good
        for bad in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "[::2]:1"):
            answer = client.get("/v1/models", headers={"Host": bad})
            assert (answer.status_code, answer.json()["error"]["code"]) == (421, "unknown_host"), bad


def test_serve_http_a_dead_engine_is_not_healthy(made):
    with running(made) as server, server.client() as client:
        assert client.get("/health").status_code == 200
        server.served.engine.close()
        assert client.get("/health").status_code == 503
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_failed")


def test_serve_http_a_path_cannot_write_log_lines():
    record = logging.LogRecord("deltaw.serve", logging.INFO, "", 0, "request", None, None)
    record.told = {"path": "/a\n2026 info request status=200", "status": 404}
    assert Lines().format(record).endswith('request path="/a\\n2026 info request status=200" status=404')
    assert json.loads(JsonLines().format(record))["path"] == record.told["path"]


def test_serve_http_a_process_drains_on_sigterm(made, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", "--base", str(made.base), "--name", "tiny", "--dtype", "float32", "--port", str(port)]
    words += ["--adapter", f"mine={made.loose / 'v1'}", "--json-logs", "--kv-mb", "8"]
    command = [sys.executable, "-c", "from deltaw.cli.main import main; main()", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(url, process)
        slow = {**LONG, "model": "mine", "stream": True, "n": 8}  # still running when the next requests come
        with httpx.stream("POST", f"{url}/v1/completions", json=slow, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            statuses = _statuses(url)
            text = [line for line in lines if line]
        assert text[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in text[-2]
        assert statuses == (200, 503, 503)
        assert process.wait(15) == 0
        logs = [json.loads(line) for line in process.stderr if line.startswith("{")]
        done = [log for log in logs if log.get("path") == "/v1/completions" and log["status"] == 200]
        assert done[0]["model"] == "mine"
        assert done[0]["output_tokens"] == 8 * LONG["max_tokens"]
        assert {"request_id", "ms", "time", "prompt_tokens"} <= set(done[0])
        assert "draining" in {log["event"] for log in logs}
    finally:
        process.kill()
        process.stderr.close()


def test_serve_http_a_drain_that_takes_too_long_ends_requests(made):
    with running(made, ServerSettings(drain_s=0.2), step_s=0.02) as server:
        client = server.client()
        with client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "draining"
        assert server.idle()
        client.close()


def _wait_ready(url: str, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the server did not come up")


def _statuses(url: str) -> tuple[int, int, int]:
    """/health, /ready and a new request, once the drain has begun."""
    until = time.monotonic() + 5
    while time.monotonic() < until and httpx.get(f"{url}/ready").status_code == 200:
        time.sleep(0.01)
    new = httpx.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "a"})
    return httpx.get(f"{url}/health").status_code, httpx.get(f"{url}/ready").status_code, new.status_code
