"""What requests may say. Unknown fields are refused by name; what is taken without effect is listed in NO_EFFECT."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from deltaw.serve.sampler import MOST_BIAS

MAX_STOPS = 16
MAX_BIASES = 1024
MAX_DEPTH = 32
"""Levels of a JSON schema."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Share = Annotated[float, Field(allow_inf_nan=False)]
Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
Bias = Annotated[Share, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Text = Annotated[str, Field(max_length=2**24)]

NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
"""Fields that OpenAI's clients send and that change no answer: taken, and nothing is done with them."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "suffix": ("",),
    "best_of": (1,),
    "reasoning_effort": (),
    "verbosity": (),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields of OpenAI's that are not served: these values (and null) ask for nothing, any other is refused by name."""

EMPTY = ("refusal", "annotations", "audio", "function_call", "tool_calls")
"""Parts of a message that are not served, and may be there as null or []."""


class Strict(BaseModel):
    """A request's body or a part of it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Strict):
    """include_usage: one more piece before [DONE], with the usage; include_obfuscation has no effect."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class JsonSchema(Strict):
    """A named schema that the answer obeys."""

    name: Annotated[str, Field(min_length=1, max_length=64)] = "answer"
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """text, json_object (any object) or json_schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _belongs(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to type json_schema, and to no other")
        return self

    def constraint(self) -> str | None:
        """JSON text of the schema; None: no constraint. Raises ValueError for one that is nested too deep."""
        if self.type == "text":
            return None
        if self.json_schema is None:
            return "{}"
        if depth(self.json_schema.schema_) > MAX_DEPTH:
            raise ValueError(f"the schema is nested deeper than {MAX_DEPTH} levels")
        return json.dumps(self.json_schema.schema_, separators=(",", ":"))


def depth(value: Any) -> int:
    """Levels of objects and lists, without recursion."""
    level, deepest = [value], 0
    while level:
        deepest += 1
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
    return deepest


class Asked(Strict):
    """What both kinds of completion take.

    model       the base's name, NAME, NAME@VERSION or NAME@LABEL; "" is the base
    adapter_id  LoRAX's word for an adapter: as `model`, beside "" or the base's name there
    """

    model: Annotated[str, Field(max_length=256)]
    adapter_id: Annotated[str, Field(max_length=256)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[Share, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[Share, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = 0
    min_p: Annotated[Share, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[Share, Field(gt=0, le=100)] | None = 1.0
    presence_penalty: Annotated[Share, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[Share, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[Id, Bias], Field(max_length=MAX_BIASES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(max_length=MAX_STOPS)]
        | None
    ) = None
    stop_token_ids: Annotated[list[Id], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = False
    response_format: ResponseFormat | None = None
    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, values in HARMLESS.items():
            if name in given and not any(given[name] is v or given[name] == v for v in (None, *values)):
                raise PydanticCustomError("not_served", "{field} is not served here: leave it out", {"field": name})
        return {name: value for name, value in given.items() if name not in HARMLESS}

    @field_validator("stop", mode="after")
    @classmethod
    def _as_list(cls, value: str | list[str] | None) -> list[str] | None:
        return [value] if isinstance(value, str) else value


class CompletionRequest(Asked):
    """POST /v1/completions. `echo` puts the prompt in front of the answer; not together with logprobs."""

    prompt: (
        Text
        | Annotated[list[Id], Field(min_length=1)]
        | Annotated[list[Text], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[Id], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = False

    @model_validator(mode="after")
    def _right(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            reason = "{field} with logprobs is not served: the prompt's tokens have no logprobs here"
            raise PydanticCustomError("not_served", reason, {"field": "echo"})
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry a prompt: text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], str | list) else [self.prompt]


class TextPart(Strict):
    """A piece of a message: text only."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """One turn. developer is OpenAI's newer word for system."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=256)]
    name: Annotated[str, Field(max_length=64)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        """An answer of ours can be sent back as it came: OpenAI's client adds null for what it does not hold."""
        if not isinstance(given, dict):
            return given
        return {k: v for k, v in given.items() if k not in EMPTY or v not in (None, [])}

    def plain(self) -> dict[str, str]:
        """As chat templates take it; parts are joined by line ends."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text, **({"name": self.name} if self.name is not None else {})}


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @model_validator(mode="after")
    def _right(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        return self


class TokenizeRequest(Strict):
    """POST /tokenize: a prompt, or messages as the chat template writes them."""

    model: Annotated[str, Field(max_length=256)] = ""
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Annotated[str, Field(max_length=256)] = ""
    tokens: Annotated[list[Id], Field(max_length=2**20)]


class LoadRequest(Strict):
    """POST /v1/load_lora_adapter, as vLLM has it. The path is under --adapter-root or in the registry."""

    lora_name: Annotated[str, Field(max_length=100)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(Strict):
    """POST /v1/unload_lora_adapter, as vLLM has it; its number for an adapter means nothing here."""

    lora_name: Annotated[str, Field(max_length=100)]
    lora_int_id: int | None = None
