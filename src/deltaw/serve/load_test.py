"""A load test: how a server holds up under one's own adapters and traffic, before one commits to it.

Latencies are what a client sees: time to the first token, between two pieces of a stream, of the whole request.
Tokens are counted as the server says in `usage`. Works with any server of OpenAI's API that streams and has /tokenize.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx

from deltaw.errors import DataError, NotFound, ServeError, WorkFailed

TRAFFIC = ("uniform", "skewed", "identical", "none")
_WORDS = "time year people way day man thing woman life child world school state family student group country problem"


@dataclass(frozen=True)
class Load:
    """What is asked of the server.

    traffic        over `adapters`: each as often; skewed (Zipf: the k-th with weight 1 / k); all the first; none (base)
    adapters       names; empty: all that the server lists
    requests       in all; rate: begun each second, at random (Poisson); None: `concurrency` at once, always
    prompt_tokens, output_tokens   of each request, where `prompts` gives no bodies; answers do not end early
    prompts        bodies with prompt or messages, in turn
    warm_up        requests before, which do not count
    """

    traffic: str = "uniform"
    adapters: tuple[str, ...] = ()
    requests: int = 48
    rate: float | None = None
    concurrency: int = 16
    prompt_tokens: int = 64
    output_tokens: int = 64
    prompts: tuple[dict[str, Any], ...] = ()
    warm_up: int = 0
    seed: int = 0
    key: str | None = field(default=None, repr=False)


@dataclass
class Seen:
    """One request as its client saw it (seconds, perf_counter)."""

    model: str
    began_s: float
    error: str | None = None
    first_s: float | None = None
    ended_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0


def read_prompts(path: Path) -> tuple[dict[str, Any], ...]:
    """Bodies from a JSONL file of {"prompt"} or {"messages"} rows. Raises DataError, NotFound."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise NotFound(f"{path} cannot be read: {problem}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as problem:
            raise DataError(f"{path}:{number}: no JSON: {problem}") from None
        if row is None:
            continue
        key = next((k for k in ("messages", "prompt") if isinstance(row, dict) and row.get(k)), None)
        if key is None:
            raise DataError(f"{path}:{number}: a row has prompt or messages.")
        kept = row[key]
        if key == "messages" and kept[-1].get("role") == "assistant":
            kept = kept[:-1]  # a training row: the answer is the server's to give
        found.append({key: kept})
    if not found:
        raise DataError(f"{path} has no rows.")
    return tuple(found)


def pick_models(load: Load, base: str, adapters: Sequence[str]) -> list[str]:
    """The model of each request. Raises ServeError where traffic over adapters finds none."""
    if load.traffic not in TRAFFIC:
        raise ServeError(f"Unknown traffic {load.traffic!r}. Known: {', '.join(TRAFFIC)}.")
    if load.traffic == "none":
        return [base] * load.requests
    if not adapters:
        raise ServeError(f"Traffic {load.traffic!r} needs adapters, and the server lists none. Use --traffic none.")
    rng = random.Random(load.seed)
    if load.traffic == "identical":
        return [adapters[0]] * load.requests
    if load.traffic == "uniform":
        picked = [adapters[i % len(adapters)] for i in range(load.requests)]
        rng.shuffle(picked)
        return picked
    order = list(adapters)
    rng.shuffle(order)
    weights = list(accumulate(1 / k for k in range(1, len(order) + 1)))
    return rng.choices(order, cum_weights=weights, k=load.requests)


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90 and p99 by linear interpolation, as numpy's; null of nothing."""
    ranked = sorted(values)
    found: dict[str, float | None] = {}
    for share in (50, 90, 99):
        if not ranked:
            found[f"p{share}"] = None
            continue
        at = (len(ranked) - 1) * share / 100
        low = int(at)
        high = min(low + 1, len(ranked) - 1)
        found[f"p{share}"] = ranked[low] + (ranked[high] - ranked[low]) * (at - low)
    return found


async def run_load(url: str, load: Load) -> dict[str, Any]:
    """Send the load to the server at `url` (without /v1) and measure. Raises WorkFailed when it cannot be reached.

    returns  requests, seconds, output_tokens_per_s, requests_per_s, ttft_ms, inter_token_ms, latency_ms (p50, p90,
             p99 each), errors by kind ({} when all is well), models (how many were asked)
    """
    headers = {} if load.key is None else {"Authorization": f"Bearer {load.key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=600) as client:
        try:
            base, listed = await _models(client)
            models = pick_models(load, base, load.adapters or listed)
            bodies = await _bodies(client, load, base)
        except httpx.HTTPError as problem:
            raise WorkFailed(f"The server at {url} does not answer as one of OpenAI's API: {problem}") from None
        for number in range(load.warm_up):
            await _ask(client, models[number % len(models)], next(bodies))
        seen, took_s = await _send(client, load, models, bodies)
    return summary(seen, took_s) | {"traffic": load.traffic, "concurrency": load.concurrency, "rate": load.rate}


async def _models(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    answer = await client.get("/v1/models")
    answer.raise_for_status()
    listed = answer.json()["data"]
    bases = [model["id"] for model in listed if not model.get("parent")]
    return (bases or [""])[0], [model["id"] for model in listed if model.get("parent")]


async def _bodies(client: httpx.AsyncClient, load: Load, base: str) -> Iterator[dict[str, Any]]:
    if load.prompts:
        return _repeated([{**body, "max_tokens": load.output_tokens} for body in load.prompts])
    rng = random.Random(load.seed + 1)
    words = _WORDS.split()
    text = " ".join(rng.choice(words) for _ in range(load.prompt_tokens * 2 + 64))
    answer = await client.post("/tokenize", json={"model": base, "prompt": text})
    answer.raise_for_status()
    ids = answer.json()["tokens"]

    def bodies() -> Iterator[dict[str, Any]]:
        while True:  # random tokens of a text: every prompt is another one, and has just so many
            prompt = [rng.choice(ids) for _ in range(load.prompt_tokens)]
            yield {"prompt": prompt, "max_tokens": load.output_tokens, "ignore_eos": True}

    return bodies()


def _repeated(bodies: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    while True:
        yield from bodies


async def _send(
    client: httpx.AsyncClient, load: Load, models: list[str], bodies: Iterator[dict[str, Any]]
) -> tuple[list[Seen], float]:
    began_s = time.perf_counter()
    gate = asyncio.Semaphore(load.concurrency if load.rate is None else len(models) or 1)
    rng = random.Random(load.seed + 2)

    async def one(model: str, body: dict[str, Any]) -> Seen:
        async with gate:
            return await _ask(client, model, body)

    tasks = []
    for model in models:
        if load.rate is not None:
            await asyncio.sleep(rng.expovariate(load.rate))
        tasks.append(asyncio.ensure_future(one(model, next(bodies))))
    seen = list(await asyncio.gather(*tasks))
    return seen, time.perf_counter() - began_s


async def _ask(client: httpx.AsyncClient, model: str, body: dict[str, Any]) -> Seen:
    """One request, streamed."""
    route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    asked = {"model": model, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
    seen = Seen(model, time.perf_counter())
    try:
        async with client.stream("POST", route, json=asked) as answer:
            if answer.status_code != 200:
                found = json.loads(await answer.aread())
                seen.error = f"{answer.status_code} {found['error']['code'] or found['error']['message'][:80]}"
            else:
                await _listen(answer, seen)
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as problem:
        seen.error = type(problem).__name__
    seen.ended_s = time.perf_counter()
    return seen


async def _listen(answer: httpx.Response, seen: Seen) -> None:
    last_s, is_done = None, False
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        now_s = time.perf_counter()
        if line == "data: [DONE]":
            is_done = True
            continue
        piece = json.loads(line.removeprefix("data: "))
        if "error" in piece:
            seen.error = f"stream {piece['error']['code']}"
            return
        if piece["choices"]:
            seen.first_s = seen.first_s or now_s
            if last_s is not None:
                seen.gaps_s.append(now_s - last_s)
            last_s = now_s
        if told := piece.get("usage"):
            seen.prompt_tokens, seen.output_tokens = told["prompt_tokens"], told["completion_tokens"]
    if not is_done:
        seen.error = "stream cut off"


def summary(seen: Sequence[Seen], took_s: float) -> dict[str, Any]:
    """The figures of a run. Errors count as requests, and in nothing else."""
    good = [one for one in seen if one.error is None]
    made = sum(one.output_tokens for one in good)

    def in_ms(values: list[float]) -> dict[str, float | None]:
        return {k: None if v is None else round(v * 1e3, 2) for k, v in percentiles(values).items()}

    return {
        "requests": len(seen),
        "errors": dict(Counter(one.error for one in seen if one.error is not None)),
        "models": len({one.model for one in seen}),
        "seconds": round(took_s, 3),
        "prompt_tokens": sum(one.prompt_tokens for one in good),
        "output_tokens": made,
        "output_tokens_per_s": round(made / took_s, 1),
        "requests_per_s": round(len(good) / took_s, 2),
        "ttft_ms": in_ms([one.first_s - one.began_s for one in good if one.first_s is not None]),
        "inter_token_ms": in_ms([gap for one in good for gap in one.gaps_s]),
        "latency_ms": in_ms([one.ended_s - one.began_s for one in good]),
    }
