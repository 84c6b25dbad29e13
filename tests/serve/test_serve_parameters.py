"""Every parameter that OpenAI and vLLM know is done or refused by name; nothing is taken and left undone."""

from __future__ import annotations

import openai
import pytest
from openai.types import completion_create_params as of_text
from openai.types.chat import completion_create_params as of_chat

from deltaw.serve.schemas import HARMLESS, NO_EFFECT, ChatRequest, CompletionRequest

VLLM = """
add_generation_prompt add_special_tokens allowed_token_ids bad_words cache_salt chat_template chat_template_kwargs
continue_final_message documents ec_transfer_params echo frequency_penalty ignore_eos include_reasoning
include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids logprobs
max_completion_tokens max_tokens media_io_kwargs messages min_p min_tokens mm_payload mm_processor_kwargs model n
parallel_tool_calls presence_penalty priority prompt prompt_embeds prompt_logprobs reasoning_effort
repetition_detection repetition_penalty request_id response_format return_mm_kwargs return_prompt_text
return_token_ids return_token_offsets return_tokens_as_token_ids routed_experts_prompt_start seed session_id
skip_special_tokens spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options
structured_outputs suffix temperature thinking_token_budget tool_choice tools top_k top_logprobs top_p
truncate_prompt_tokens truncation_side use_beam_search user vllm_xargs watermarking guided_json guided_regex
guided_choice guided_grammar best_of logits_processors
"""
"""Of vLLM 0.32's two completion requests, and what older ones had."""

TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
ROUTES = {
    "/v1/completions": (CompletionRequest, of_text.CompletionCreateParamsBase, {"prompt": "ab"}),
    "/v1/chat/completions": (
        ChatRequest, of_chat.CompletionCreateParamsBase, {"messages": [{"role": "user", "content": "a"}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_serve_parameters_are_done_or_refused_by_name(http, route):
    fields, told, body = ROUTES[route]
    known = set(told.__annotations__) | set(VLLM.split())
    refused = known - set(fields.model_fields)
    assert len(refused) > 40
    assert set(NO_EFFECT) <= set(fields.model_fields)
    with http.client() as client:
        for name in sorted(refused):
            answer = client.post(route, json={"model": "", "max_tokens": 1, **body, name: {"asks": "for something"}})
            assert answer.status_code == 400, name
            problem = answer.json()["error"]
            assert problem["param"] == name
            assert name in problem["message"]
            assert problem["code"] == ("not_served" if name in HARMLESS else "unknown_field")


@pytest.fixture(scope="module")
def client(http):
    with openai.OpenAI(base_url=f"{http.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_serve_parameters_tools_are_refused_and_so_are_their_messages(client):
    hi = [{"role": "user", "content": "hi"}]
    called = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    for more, param in (
        ({"messages": hi, "tools": [TOOL]}, "tools"),
        ({"messages": hi, "tools": [TOOL], "tool_choice": "required"}, "tools"),
        ({"messages": hi, "functions": [TOOL["function"]]}, "functions"),
        ({"messages": [*hi, {"role": "assistant", "tool_calls": [called]}]}, "messages.1"),
        ({"messages": hi, "modalities": ["text", "audio"]}, "modalities"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", max_tokens=1, **more)
        assert str(caught.value.param).startswith(param)
    with pytest.raises(openai.BadRequestError, match="best_of is not served here"):
        client.completions.create(model="tiny", prompt="a", best_of=3)
    with pytest.raises(openai.BadRequestError, match="suffix is not served here"):
        client.completions.create(model="tiny", prompt="a", suffix="b")


def test_serve_parameters_there_are_no_embeddings_and_that_is_said(client):
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="a")


def test_serve_parameters_a_bias_forces_and_forbids_tokens(client):
    asked = {"model": "support@2", "prompt": "abc", "max_tokens": 3, "temperature": 0, "logprobs": 5}
    plain = client.completions.create(**asked).choices[0]
    forced = client.completions.create(**asked, logit_bias={"70": 100}).choices[0]
    letter = client.post("/../detokenize", body={"tokens": [70]}, cast_to=object)["prompt"]
    assert forced.logprobs.tokens == [letter] * 3
    assert forced.logprobs.top_logprobs[0] == plain.logprobs.top_logprobs[0]  # the model's own, before the bias
    first = plain.logprobs.tokens[0]
    ids = client.post("/../tokenize", body={"prompt": first}, cast_to=object)["tokens"]
    without = client.completions.create(**asked, logit_bias={str(ids[0]): -100}).choices[0]
    assert first not in without.logprobs.tokens


def test_serve_parameters_usage_comes_last_where_it_is_asked_for(client):
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "stream": True, "extra_body": {"ignore_eos": True}}
    *pieces, last = client.completions.create(**asked, stream_options={"include_usage": True})
    assert all(piece.usage is None and piece.choices for piece in pieces)
    assert (last.choices, last.usage.completion_tokens, last.usage.prompt_tokens) == ([], 4, 3)
    assert all(piece.usage is None for piece in client.completions.create(**asked))


def test_serve_parameters_one_model_by_any_of_its_names(client):
    assert [client.models.retrieve(name).root for name in ("support", "support@2")] == ["support@1", "support@2"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("support@7")
