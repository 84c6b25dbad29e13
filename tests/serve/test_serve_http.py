"""The openai client, unchanged, against a real server."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from made_servers import POSITIONS

from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.serve.schemas import HARMLESS, NO_EFFECT, ChatRequest
from deltaw.store.registry import Registry

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(http):
    with openai.OpenAI(base_url=f"{http.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def alone(made, prompt: str, name: str | None, n: int) -> str:
    """The greedy answer of `generate`, one prompt at a time."""
    model = load_base(made.base)
    if name is not None:
        model.attach(Registry(made.registry).folder(name))
    ids = model.tokenizer(prompt)["input_ids"]
    return model.tokenizer.decode(generate(model, [ids], n)[0]).rstrip("\ufffd")  # half a character is not told


@pytest.mark.parametrize("name", [None, "support", "support@2", "support@candidate", "legal@current"])
def test_serve_http_greedy_text_is_generates(client, made, name):
    prompt = "the quick brown fox"
    answer = client.completions.create(model=name or "tiny", prompt=prompt, max_tokens=12, temperature=0)
    assert answer.choices[0].text == alone(made, prompt, name, 12)
    assert answer.object == "text_completion"


def test_serve_http_versions_and_labels_are_named(client):
    names = {"support": "support@1", "support@2": "support@2", "support@candidate": "support@2", "legal": "legal@1"}
    for asked, meant in {**names, "tiny": "tiny", "": "tiny"}.items():
        answer = client.completions.create(model=asked, prompt="a", max_tokens=1)
        assert answer.model == meant


def test_serve_http_models_have_parent_version_and_fingerprint(client, made, http):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"tiny", "support", "legal"}  # what was trained on another base is not offered
    support = models["support"]
    assert (support.parent, support.version, support.root) == ("tiny", 1, "support@1")
    assert support.fingerprint == Registry(made.registry).resolve("support").id
    assert models["tiny"].parent is None
    assert models["tiny"].fingerprint == http.served.model.fingerprint.weights
    assert client.models.retrieve("support@2").version == 2


def test_serve_http_stream_says_what_the_whole_says(client):
    asked = {"model": "support@2", "messages": HI, "max_tokens": 20, "temperature": 0.9, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts, ends, usage = ["", ""], {}, None
    for piece in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = piece.usage or usage
        for choice in piece.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]
    assert ends == {i: choice.finish_reason for i, choice in enumerate(whole.choices)}
    assert usage == whole.usage
    assert usage.prompt_tokens == len("[user]hi\n[assistant]")
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_serve_http_completions_stream_too(client):
    asked = {"model": "legal", "prompt": ["ab", "cde"], "max_tokens": 9, "temperature": 0, "echo": True}
    whole = client.completions.create(**asked)
    texts = ["", ""]
    for piece in client.completions.create(**asked, stream=True):
        for choice in piece.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert texts[0].startswith("ab")
    assert texts[1].startswith("cde")
    assert whole.usage.prompt_tokens == 5


def test_serve_http_token_ids_are_prompts_too(client):
    by_text = client.completions.create(model="tiny", prompt="abc", max_tokens=8, temperature=0)
    ids = client.post("/../tokenize", body={"prompt": "abc"}, cast_to=object)["tokens"]
    by_ids = client.completions.create(model="tiny", prompt=[ids, ids], max_tokens=8, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [by_text.choices[0].text] * 2


def test_serve_http_seed_repeats_and_others_differ(client):
    def say(seed):
        answer = client.completions.create(model="support", prompt="x", max_tokens=24, seed=seed, n=2)
        return [choice.text for choice in answer.choices]

    first, second = say(3)
    assert first != second
    assert say(3) == [first, second]
    assert say(4)[0] == second  # choice i has seed + i


def test_serve_http_stop_ends_before_the_string(client):
    free = client.completions.create(model="tiny", prompt="abc", max_tokens=30, temperature=0).choices[0]
    text = next(c for c in free.text[5:] if c.isprintable() and c not in "\ufffd")
    cut = client.completions.create(model="tiny", prompt="abc", max_tokens=30, temperature=0, stop=[text, "zz"])
    assert cut.choices[0].text == free.text[: free.text.index(text)]
    assert cut.choices[0].finish_reason == "stop"
    assert free.finish_reason == "length"


def test_serve_http_ignore_eos_makes_every_token(client):
    answer = client.completions.create(
        model="tiny", prompt="abc", max_tokens=400, seed=1, temperature=3.0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 400
    free = client.completions.create(model="tiny", prompt="abc", max_tokens=400, seed=1, temperature=3.0)
    assert free.choices[0].finish_reason == "stop"  # at that temperature the end token comes up


def test_serve_http_logprobs_are_the_models_own(client, http, made):
    completion = client.completions.create(model="tiny", prompt="abc", max_tokens=3, temperature=0, logprobs=2)
    told = completion.choices[0].logprobs
    model = load_base(made.base)
    ids = model.tokenizer("abc")["input_ids"]
    with torch.no_grad():
        first = model.logits(torch.tensor([ids]))[0, -1].log_softmax(-1)
    assert told.token_logprobs[0] == pytest.approx(first.max().item(), abs=1e-4)
    assert len(told.tokens) == len(told.top_logprobs) == len(told.text_offset) == 3
    assert max(told.top_logprobs[0].values()) == told.token_logprobs[0]
    asked = {"model": "tiny", "messages": HI, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(**asked)
    entries = chat.choices[0].logprobs.content
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]
    assert all(entry.top_logprobs[0].logprob == entry.logprob for entry in entries)
    assert all(entry.bytes is None or bytes(entry.bytes).decode() == entry.token for entry in entries)
    pieces = [c for p in client.chat.completions.create(**asked, stream=True) for c in p.choices]
    streamed = [entry for choice in pieces if choice.logprobs for entry in choice.logprobs.content]
    assert streamed == entries


def test_serve_http_answers_obey_a_schema(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "reply", "schema": SCHEMA, "strict": True}}
    for model in ("tiny", "support@2"):
        answer = client.chat.completions.create(
            model=model, messages=HI, response_format=wanted, max_tokens=60, seed=5, temperature=2.0
        )
        found = json.loads(answer.choices[0].message.content)
        assert set(found) == {"ok", "n"}
        assert found["n"] in (1, 22, 333)
        assert answer.choices[0].finish_reason == "stop"


def test_serve_http_an_adapters_own_template_is_used(http):
    with http.client() as client:
        body = {"messages": HI, "add_generation_prompt": True}
        own = client.post("/tokenize", json={**body, "model": "legal"}).json()
        base = client.post("/tokenize", json={**body, "model": "support"}).json()
        assert (own["count"], base["count"]) == (len("<hi>"), len("[user]hi\n[assistant]"))
        assert own["max_model_len"] == POSITIONS
        text = client.post("/detokenize", json={"model": "legal", "tokens": own["tokens"]}).json()
        assert text == {"prompt": "<hi>"}
        chat = client.post("/v1/chat/completions", json={"model": "legal", "messages": HI, "max_tokens": 2}).json()
        assert chat["usage"]["prompt_tokens"] == len("<hi>")


def test_serve_http_parts_and_developers_are_taken(client):
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    answer = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=2)
    assert answer.usage.prompt_tokens == len("[system]short\n[user]a\nb\n[assistant]")
    assert answer.usage.completion_tokens <= 2


def test_serve_http_an_answer_can_be_sent_back(client):
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=3, seed=1)
    turns = [*HI, answer.choices[0].message, {"role": "user", "content": "go on"}]
    assert client.chat.completions.create(model="tiny", messages=turns, max_tokens=1).usage.prompt_tokens > 20


def test_serve_http_adapter_id_is_lorax_word_for_model(http):
    with http.client() as client:
        body = {"model": "tiny", "adapter_id": "support@2", "prompt": "a", "max_tokens": 1}
        assert client.post("/v1/completions", json=body).json()["model"] == "support@2"
        clash = client.post("/v1/completions", json={**body, "model": "legal"})
        assert (clash.status_code, clash.json()["error"]["param"]) == (400, "adapter_id")


@pytest.mark.parametrize(
    ("changed", "param", "code"),
    [
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": POSITIONS}, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x" * (POSITIONS + 1)}, "prompt", "context_length_exceeded"),
        ({"prompt": ""}, "prompt", None),
        ({"prompt": [7, 257]}, "prompt", "invalid_value"),
        ({"echo": True, "logprobs": 1}, "echo", "not_served"),
        ({"n": 99}, "n", "too_many"),
        ({"extra_body": {"best_off": 2}}, "best_off", "unknown_field"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex", "unknown_field"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "invalid_value"),
    ],
)
def test_serve_http_what_cannot_be_done_is_refused_by_name(client, changed, param, code):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "abc", "max_tokens": 4, **changed})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    named = param or next(iter(changed))
    assert named in caught.value.message or code == "too_many" or "prompt" in caught.value.message


def test_serve_http_unknown_models_and_other_bases_have_their_errors(client):
    for name in (
        "nobody",
        "support@9",
        "support@gold",
        "support@v1",
        "../base",
        "tiny@1",
        "9f0c21aa",
        "a/../b",
        "\u00e9",
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt="a")
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="foreign", prompt="a")
    assert caught.value.code == "base_mismatch"


def test_serve_http_fields_without_effect_are_taken(client):
    harmless = {name: values[0] for name, values in HARMLESS.items() if values}
    sent = harmless | dict.fromkeys(NO_EFFECT, "x")
    assert not set(HARMLESS) & set(ChatRequest.model_fields)
    answer = client.chat.completions.create(model="tiny", messages=HI, max_tokens=1, extra_body=sent)
    assert answer.usage.completion_tokens == 1


def test_serve_http_every_field_reaches_the_engine(client, http, monkeypatch):
    seen = []
    submit = http.served.engine.submit
    monkeypatch.setattr(
        http.served.engine, "submit", lambda request, told: seen.append(request) or submit(request, told)
    )
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "stop_token_ids": [5], "ignore_eos": True}
    client.completions.create(
        model="support@2", prompt="abc", max_tokens=3, temperature=0.7, top_p=0.9, seed=11, logprobs=4, stop="qq", n=2,
        presence_penalty=0.3, frequency_penalty=-0.4, logit_bias={"5": -3.5, "70": 2}, extra_body=extra,
    )  # fmt: skip
    first, second = (request.sampling for request in seen)
    assert (first.seed, second.seed) == (11, 12)
    assert (first.max_tokens, first.temperature, first.top_p, first.logprobs, first.stop) == (3, 0.7, 0.9, 4, ("qq",))
    assert (first.presence_penalty, first.frequency_penalty) == (0.3, -0.4)
    assert first.logit_bias == ((5, -3.5), (70, 2.0))
    assert (first.top_k, first.min_p, first.repetition_penalty) == (7, 0.1, 1.2)
    assert (first.stop_token_ids, first.ignore_eos) == ((5,), True)
    assert seen[0].adapter in http.served.engine.names()
