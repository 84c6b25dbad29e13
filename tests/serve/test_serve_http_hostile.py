"""Hostile input: malformed, oversized, deep, made up from our own OpenAPI. Never a 5xx, always OpenAI's error body."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from made_servers import ADMIN, running
from schemathesis import GenerationMode

from deltaw.serve.keys import hash_key
from deltaw.serve.schemas import MAX_DEPTH
from deltaw.serve.settings import ServerSettings

JSON = {"Content-Type": "application/json"}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def small(made):
    """Short answers, so that fuzzing costs little."""
    limits = ServerSettings(
        max_output_tokens=8, max_choices=4, admin_sha256=hash_key(ADMIN), adapter_roots=(made.loose,)
    )
    with running(made, limits) as server:
        yield server


def assert_refused(answer: httpx.Response, *statuses: int) -> dict[str, Any]:
    assert answer.status_code in (statuses or range(400, 500)), answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "Traceback" not in answer.text
    return error


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": "tiny"', b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"NaN",
     b'{"model": "tiny", "prompt": "a", "temperature": NaN}', b'{"model": "tiny", "prompt": "a", "top_p": 1e999}',
     b'{"model": "tiny", "prompt": "\\ud800"}', b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
     b'{"model": "tiny", "prompt": [1e308]}', b'{"model": "tiny", "prompt": [-1]}', b'{"model": "tiny", "prompt": {}}',
     b'{"model": "tiny", "prompt": [[]]}', b'{"model": "tiny", "prompt": [[1], "a"]}', b'{"text": "a"}',
     b'{"model": "tiny", "prompt": "a", "stop": ""}', b'{"model": "tiny", "prompt": "a", "stop": ' + b'["a",' * 99],
)  # fmt: skip
def test_serve_http_malformed_bodies_are_refused(small, body):
    with small.client() as client:
        for route in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            assert_refused(client.post(route, content=body, headers=JSON))


def bombs():
    deep: Any = {"type": "string"}
    for _ in range(MAX_DEPTH):
        deep = {"type": "object", "properties": {"a": deep}}
    yield deep
    yield {"type": "array", "items": {"enum": ["x" * 90] * 1000}}  # larger than a schema may be
    yield {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    yield {"$ref": "https://example.org/schema.json"}
    yield {"type": "string", "pattern": "(" * 300 + "a" + ")" * 300}
    yield {"type": "string", "pattern": "((a{1,900}){1,900}){1,900}"}
    yield {"type": "string", "pattern": "[a"}
    yield {"type": "nothing"}
    yield {"type": "object", "properties": 5}
    yield {"type": "array", "items": {"type": "integer"}, "minItems": 10**9}
    yield {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(9)]} for i in range(9)]}


@pytest.mark.parametrize("schema", list(bombs()), ids=range(11))
def test_serve_http_schema_bombs_end_in_time(small, schema):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with small.client() as client:
        answer = client.post("/v1/chat/completions", json={**CHAT, "response_format": wanted}, timeout=10)
        assert answer.status_code < 500
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
    assert small.idle()


def test_serve_http_messages_that_the_template_refuses_are_bad_requests(small):
    with small.client() as client:
        error = assert_refused(
            client.post("/v1/chat/completions", json={**CHAT, "messages": [{"role": "tool", "content": "x"}]}), 400
        )
        assert error["param"] == "messages"
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}]
        assert_refused(client.post("/v1/chat/completions", json={**CHAT, "messages": image}), 400)
        tools = {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]}
        assert "tools" in assert_refused(client.post("/v1/chat/completions", json=tools), 400)["message"]


def test_serve_http_names_lead_nowhere(small, made):
    names = ["../../etc/passwd", str(made.foreign), "file:///etc/passwd", "support@../x", "support@1; drop table", "@",
             "support@", "@1", "support@0", "support@99999999999", "hf://a/b", "http://127.0.0.1", "x" * 256,
             "support\0", "SUPPORT", " support", "%2e%2e"]  # fmt: skip
    with small.client() as client:
        for name in names:
            assert_refused(client.post("/v1/completions", json={"model": name, "prompt": "a"}), 404)
            assert_refused(client.post("/tokenize", json={"model": name, "prompt": "a"}), 404)
        assert_refused(client.post("/v1/completions", json={"model": "x" * 257, "prompt": "a"}), 400)
        for path in ("/v1/models/..%2f..%2fetc", "/v1/models/%00", "/v1/nothing", "/docs", "/static/../x"):
            assert_refused(client.get(path), 404)
        assert_refused(client.get("/v1/completions"), 405)


FUZZED = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/v1/load_lora_adapter")


CASES = [(path, mode) for path in FUZZED for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
CASES.remove(("/v1/models", GenerationMode.NEGATIVE))  # nothing to misfit: it takes no argument


@pytest.mark.parametrize(("path", "mode"), CASES)
def test_serve_http_what_our_openapi_allows_or_forbids_never_fails(small, path, mode):
    schema = schemathesis.openapi.from_dict(small.app.openapi())
    method = "get" if path == "/v1/models" else "post"
    operation = schema[path][method.upper()]
    seen = []
    client = small.client(ADMIN)

    @seed(7)
    @settings(
        max_examples=12, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def fuzz(case):
        kwargs = case.as_transport_kwargs(base_url=small.url)
        request = client.build_request(
            kwargs["method"], kwargs["url"], params=kwargs.get("params"), json=kwargs.get("json"),
            content=kwargs.get("data") if isinstance(kwargs.get("data"), bytes | str) else None,
        )  # fmt: skip
        answer = client.send(request)
        seen.append(answer.status_code)
        assert answer.status_code < 500, (answer.text, json.dumps(kwargs.get("json"), default=str)[:500])
        if answer.status_code >= 400:
            assert_refused(answer)

    fuzz()
    client.close()
    assert len(seen) >= (1 if path == "/v1/models" else 5)
    assert small.idle()
