"""OpenAI's routes: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from deltaw.serve.answers import DONE, Answer, ChatShape, Shape, TextShape, event, usage
from deltaw.serve.jobs import Job, Order, begin, find
from deltaw.serve.refuse import error_body, refused
from deltaw.serve.schemas import Asked, ChatRequest, CompletionRequest
from deltaw.serve.serving import LOG, Serving
from deltaw.serve.words import Words

router = APIRouter()
CLIENT_GONE = 499  # nginx's number, for the log: nobody reads it
SCHEMA_FAILED = "The JSON schema:"  # how the engine begins to say that a grammar came to a dead end
DEFAULT_TOKENS = 16  # OpenAI's, of /v1/completions; a chat goes on to its end

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"description": "A completion, or with stream a text/event-stream of its pieces."}
}


@router.get("/v1/models")
async def models(request: Request) -> JSONResponse:
    """The base and the adapters that the caller may use."""
    serving: Serving = request.app.state.serving
    return JSONResponse({"object": "list", "data": await serving.served.cards(request.state.key)})


@router.get("/v1/models/{model:path}")
async def model(model: str, request: Request) -> dict[str, Any]:
    """One model, by any name that requests may use."""
    serving: Serving = request.app.state.serving
    return serving.served.describe(await find(serving, model, request.state.key))


@router.post("/v1/completions", responses=_STREAM)
async def completions(asked: CompletionRequest, request: Request) -> Response:
    """Go on from a prompt: text, token ids, or several of either."""
    given = asked.prompts()

    def encode(words: Words) -> list[list[int]]:
        return [words.encode(p) if isinstance(p, str) else words.check(p) for p in given]

    order = _order(request, asked, len(given), encode, asked.max_tokens, DEFAULT_TOKENS, asked.logprobs)
    job = await begin(request.app.state.serving, order)
    shape = TextShape(order.request_id, str(job.card), job.card.id, job.words, with_logprobs=asked.logprobs is not None)
    echoes = [""] * len(given)
    if asked.echo:
        echoes = [p if isinstance(p, str) else job.words.decode(p) for p in given]
    return await _answer(request, asked, job, shape, echoes)


@router.post("/v1/chat/completions", responses=_STREAM)
async def chat_completions(asked: ChatRequest, request: Request) -> Response:
    """The assistant's next turn, written by the chat template of the adapter or else of the base."""
    messages = [message.plain() for message in asked.messages]

    def encode(words: Words) -> list[list[int]]:
        return [words.encode_chat(messages)]

    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    most = asked.max_completion_tokens or asked.max_tokens
    order = _order(request, asked, 1, encode, most, None, logprobs)
    job = await begin(request.app.state.serving, order)
    shape = ChatShape(order.request_id, str(job.card), job.card.id, job.words, with_logprobs=bool(asked.logprobs))
    return await _answer(request, asked, job, shape, [""])


def _order(
    request: Request, asked: Asked, n: int, encode: Any, most: int | None, default: int | None, logprobs: int | None
) -> Order:
    if asked.stream_options is not None and not asked.stream:
        raise refused(400, "stream_options needs stream: true.", None, "stream_options")
    return Order(asked, request.state.request_id, request.state.key, n, encode, most, default, logprobs)


async def _answer(request: Request, asked: Asked, job: Job, shape: Shape, echoes: list[str]) -> Response:
    note = request.state.note
    note |= {"model": str(job.card), "prompt_tokens": sum(map(len, job.prompts))}
    n = asked.n or 1
    answers = [Answer(echo=echo, offset=len(echo)) for echo in echoes for _ in range(n)]
    if asked.stream:
        told = asked.stream_options is not None and asked.stream_options.include_usage
        return Stream(job, _pieces(job, shape, answers, note, tells=told), request.app.state.serving)
    return await _whole(request, job, shape, answers, note)


async def _whole(request: Request, job: Job, shape: Shape, answers: list[Answer], note: dict[str, Any]) -> Response:
    """All of it, unless the client goes away first."""
    reading = asyncio.ensure_future(_read(job, answers))
    watching = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({reading, watching}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not reading.done():
            reading.cancel()
            job.generation.cancel()
    note["output_tokens"] = job.generation.n_tokens
    if not reading.done() or reading.cancelled():
        request.app.state.serving.metrics.cancelled.inc()
        return Response(status_code=CLIENT_GONE)
    if (problem := reading.result()) is not None:
        raise refused(*problem)
    return JSONResponse(shape.body(answers, note["prompt_tokens"]))


async def _read(job: Job, answers: list[Answer]) -> tuple[int, str, str] | None:
    """Fill `answers`; returns what went wrong in the engine as (status, message, code)."""
    problem = None
    async for outputs in job.generation.outputs():
        for index, output in outputs:
            answers[index].outputs.append(output)
            answers[index].text += output.text
            answers[index].finished = output.finished
            problem = problem or _problem(output.finished, output.error)
            if problem is not None:
                job.generation.cancel()
    return problem


def _problem(finished: str | None, error: str | None) -> tuple[int, str, str] | None:
    if finished == "error" and (error or "").startswith(SCHEMA_FAILED):
        return 400, f"{str(error).splitlines()[0]}: no answer can follow this schema.", "schema_failed"
    if finished == "error":
        LOG.error("the engine ended a request: %s", error)
        return 500, "The model could not go on with this request; the server's log says why.", "engine_failed"
    if finished == "cancelled":
        return 503, "The server ended this request: it is shutting down.", "draining"
    return None


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _pieces(
    job: Job, shape: Shape, answers: list[Answer], note: dict[str, Any], *, tells: bool
) -> AsyncIterator[bytes]:
    """Events of a stream, one for each token; an error is an event too, and the last."""
    async for outputs in job.generation.outputs():
        for index, output in outputs:
            problem = _problem(output.finished, output.error)
            if problem is not None:
                job.generation.cancel()
                yield event(error_body(*problem))
                return
            yield shape.chunk([shape.pieces(index, answers[index], output)], None, tells=tells)
    note["output_tokens"] = job.generation.n_tokens
    if tells:
        yield shape.chunk([], usage(note["prompt_tokens"], job.generation.n_tokens), tells=True)
    yield DONE


class Stream(StreamingResponse):
    """Server-sent events; whatever ends the response, the engine is told."""

    def __init__(self, job: Job, pieces: AsyncIterator[bytes], serving: Serving) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pieces, media_type="text/event-stream", headers=headers)
        self.job, self.serving = job, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all pieces, or cancel."""
        is_whole = False

        async def noting(message: Any) -> None:
            nonlocal is_whole
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await super().__call__(scope, receive, noting)
        finally:
            scope["state"]["note"]["output_tokens"] = self.job.generation.n_tokens
            self.job.generation.cancel()
            if not is_whole:
                scope["state"]["note"]["gone"] = True
                self.serving.metrics.cancelled.inc()
