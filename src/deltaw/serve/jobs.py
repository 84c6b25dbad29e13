"""One request for answers: room, adapter, tokens, the engine; and what each of them gets back at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from deltaw.errors import AdapterError, BaseMismatch, DeltawError, WorkFailed
from deltaw.serve.bridge import Generation
from deltaw.serve.keys import Key
from deltaw.serve.refuse import of_error, refused
from deltaw.serve.residency import Card, Lease
from deltaw.serve.schemas import Asked
from deltaw.serve.serving import LOG, Serving
from deltaw.serve.types import Request, Sampling
from deltaw.serve.words import Words

_SEEDS = 2**63
Encode = Callable[[Words], list[list[int]]]


@dataclass(frozen=True)
class Job:
    """A running request: `prompts` by token ids; answer i belongs to prompt i // n."""

    card: Card
    words: Words
    generation: Generation
    prompts: list[list[int]]


def model_asked(asked: Asked, base_name: str) -> str:
    """The model that a body names by `model` or LoRAX's `adapter_id`. Raises the refusal 400 when they differ."""
    if not asked.adapter_id or asked.adapter_id == asked.model:
        return asked.model
    if asked.model not in ("", base_name):
        raise refused(400, f"model {asked.model!r} and adapter_id {asked.adapter_id!r} differ.", None, "adapter_id")
    return asked.adapter_id


async def find(serving: Serving, asked: str, key: Key | None) -> Card:
    """The card of a model's name. Raises the refusal 404."""
    try:
        return await serving.served.resolve(asked, key)
    except DeltawError as problem:
        raise of_error(problem, "model") from None


def unusable(problem: DeltawError, card: Card) -> Exception:
    """The refusal for an adapter that cannot be served. What names files of this machine goes to the log alone."""
    if isinstance(problem, BaseMismatch) or not isinstance(problem, AdapterError | WorkFailed | LookupError):
        return of_error(problem, "model")
    LOG.error("adapter %s cannot be served: %s: %s", card, type(problem).__name__, problem)
    message = f"The adapter {card} cannot be served here: it is damaged or of a kind that cannot share a batch."
    return refused(400, message, "adapter_unusable", "model")


def sampling_of(asked: Asked, max_tokens: int, logprobs: int | None, schema: str | None) -> Sampling:
    """The engine's settings for a request; null means the default."""
    return Sampling(
        max_tokens=max_tokens,
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_p=1.0 if asked.top_p is None else asked.top_p,
        top_k=max(asked.top_k or 0, 0),
        min_p=asked.min_p or 0.0,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        presence_penalty=asked.presence_penalty or 0.0,
        frequency_penalty=asked.frequency_penalty or 0.0,
        logit_bias=tuple((asked.logit_bias or {}).items()),
        seed=asked.seed,
        logprobs=logprobs,
        stop=tuple(asked.stop or ()),
        stop_token_ids=tuple(asked.stop_token_ids or ()),
        ignore_eos=bool(asked.ignore_eos),
        json_schema=schema,
    )


def schema_of(serving: Serving, asked: Asked) -> str | None:
    """The schema that answers shall obey, as JSON text. Raises the refusal 400 for one that is too large or deep."""
    if asked.response_format is None:
        return None
    try:
        text = asked.response_format.constraint()
    except ValueError as problem:
        raise refused(400, f"response_format: {problem}.", None, "response_format") from None
    if text is not None and len(text) > serving.settings.max_schema_bytes:
        message = f"The schema has {len(text)} bytes; at most {serving.settings.max_schema_bytes}."
        raise refused(400, message, "schema_too_large", "response_format")
    return text


@dataclass(frozen=True)
class Order:
    """What a route asks for. encode: prompts from the model's words, run beside the loop."""

    asked: Asked
    request_id: str
    key: Key | None
    n_prompts: int
    encode: Encode
    max_tokens: int | None
    default_tokens: int | None
    logprobs: int | None


async def begin(serving: Serving, order: Order) -> Job:
    """Start a request in the engine. Raises refusals; nothing is held then.

    Room and lease go back when the engine has ended the last sequence, not when the client goes away.
    """
    asked = order.asked
    schema = schema_of(serving, asked)
    card = await find(serving, model_asked(asked, serving.served.base_name), order.key)
    n = asked.n or 1
    place = serving.admission.enter(order.key, n * order.n_prompts)
    lease: Lease | None = None
    try:
        try:
            lease = await serving.served.lease(card)
        except DeltawError as problem:
            raise unusable(problem, card) from None
        words = serving.served.words if lease is None else lease.words
        try:
            prompts = await serving.in_text_thread(partial(order.encode, words))
        except DeltawError as problem:
            raise of_error(problem, "messages" if "messages" in type(asked).model_fields else "prompt") from None
        try:
            words.check(list(asked.logit_bias or ()), "logit_bias")
        except DeltawError as problem:
            raise of_error(problem, "logit_bias") from None
        key = None if lease is None else lease.key
        limits = [_tokens(serving, order, len(prompt), key) for prompt in prompts]
    except BaseException:
        place.release()
        if lease is not None:
            lease.release()
        raise

    def ended(generation: Generation) -> None:
        now_s = time.perf_counter()
        place.release(now_s - generation.began_s)
        if lease is not None:
            lease.release()
        serving.metrics.ended(generation, now_s)

    serving.metrics.tokens.labels("prompt").inc(sum(map(len, prompts)))
    generation = Generation(serving.bridge, ended, streams=bool(asked.stream))
    serving.running.add(generation)
    adapter = None if lease is None else lease.key
    try:
        for index in range(n * len(prompts)):
            at, copy = divmod(index, n)
            sampling = sampling_of(asked, limits[at], order.logprobs, schema)
            if sampling.seed is not None:
                sampling = replace(sampling, seed=(sampling.seed + copy) % _SEEDS)
            request = Request(f"{order.request_id}-{index}", tuple(prompts[at]), sampling, adapter)
            await generation.start(index, partial(_submit, serving, request), aside=schema is not None)
    except BaseException as problem:
        generation.cancel()
        if isinstance(problem, DeltawError):
            raise of_error(problem) from None
        raise
    finally:
        generation.started()
    return Job(card, words, generation, prompts)


def _submit(serving: Serving, request: Request, on_output: Callable[..., None]) -> Callable[[], object]:
    return serving.served.engine.submit(request, on_output).cancel


def _tokens(serving: Serving, order: Order, n_prompt: int, adapter: str | None) -> int:
    """How many tokens one answer may have. Raises the refusal 400 for a prompt or a wish that is too long."""
    settings = serving.settings
    room = serving.served.engine.most_tokens(n_prompt, adapter)
    if n_prompt == 0:
        raise refused(400, "The prompt is empty: there is nothing to go on from.", None, "prompt")
    most = settings.max_prompt_tokens
    if room < 1 or (most is not None and n_prompt > most):
        limit = n_prompt + room - 1 if most is None else min(most, n_prompt + room - 1)
        message = f"The prompt has {n_prompt} tokens; at most {max(limit, 0)} are served."
        raise refused(400, message, "context_length_exceeded", "prompt")
    cap = room if settings.max_output_tokens is None else min(room, settings.max_output_tokens)
    if order.max_tokens is not None and order.max_tokens > cap:
        message = f"max_tokens is {order.max_tokens}; behind {n_prompt} tokens of prompt at most {cap} are served."
        raise refused(400, message, "context_length_exceeded", "max_tokens")
    return order.max_tokens or min(cap, order.default_tokens or cap)
