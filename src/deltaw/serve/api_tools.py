"""Routes beside OpenAI's: tokens, health, metrics, and the admin's loading and unloading."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from deltaw.errors import DeltawError, NotFound
from deltaw.serve.jobs import find, unusable
from deltaw.serve.refuse import of_error, refused
from deltaw.serve.schemas import DetokenizeRequest, LoadRequest, TokenizeRequest, UnloadRequest
from deltaw.serve.serving import Serving
from deltaw.serve.words import Words

router = APIRouter()
admin_router = APIRouter()


@router.get("/health", responses={503: {"description": "The engine's thread has ended: restart the process."}})
async def health(request: Request) -> JSONResponse:
    """The process answers, and its engine runs."""
    alive = request.app.state.serving.served.engine.is_alive
    return JSONResponse({"status": "ok" if alive else "the engine has ended"}, 200 if alive else 503)


@router.get("/ready", responses={503: {"description": "It is shutting down."}})
async def ready(request: Request) -> JSONResponse:
    """Whether new requests are taken: 200, or 503 while the server drains."""
    draining = request.app.state.serving.admission.is_draining
    return JSONResponse({"status": "draining" if draining else "ready"}, 503 if draining else 200)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.serving.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.post("/tokenize")
async def tokenize(asked: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a prompt, or of a chat as the model's template writes it."""

    def encode(words: Words) -> list[int]:
        if asked.prompt is not None:
            return words.encode(asked.prompt, special=asked.add_special_tokens)
        chat = [message.plain() for message in asked.messages or ()]
        return words.encode_chat(chat, open_turn=asked.add_generation_prompt)

    serving: Serving = request.app.state.serving
    ids = await _with_words(serving, request, asked.model, encode)
    return {"count": len(ids), "max_model_len": serving.served.context_tokens, "tokens": ids}


@router.post("/detokenize")
async def detokenize(asked: DetokenizeRequest, request: Request) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    serving: Serving = request.app.state.serving
    text = await _with_words(
        serving, request, asked.model, lambda words: words.decode(words.check(asked.tokens, "tokens"))
    )
    return {"prompt": text}


async def _with_words(serving: Serving, request: Request, model: str, work: Any) -> Any:
    card = await find(serving, model, request.state.key)
    try:
        words = await serving.served.words_of(card)
    except DeltawError as problem:
        raise unusable(problem, card) from None
    try:
        return await serving.in_text_thread(partial(work, words))
    except DeltawError as problem:
        raise of_error(problem) from None


@admin_router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(asked: LoadRequest, request: Request) -> PlainTextResponse:
    """Serve an adapter from a folder under --adapter-root or in the registry (vLLM's route)."""
    serving: Serving = request.app.state.serving
    try:
        await serving.served.give_by_request(asked.lora_name, asked.lora_path, replace=asked.load_inplace)
    except DeltawError as problem:
        raise of_error(problem, "lora_path" if isinstance(problem, NotFound) else "lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@admin_router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(asked: UnloadRequest, request: Request) -> PlainTextResponse:
    """Serve an adapter no longer that was given by its path (vLLM's route). Running requests end."""
    serving: Serving = request.app.state.serving
    if asked.lora_int_id is not None:
        raise refused(400, "lora_int_id means nothing here: give lora_name.", None, "lora_int_id")
    try:
        await serving.served.take_back(asked.lora_name)
    except DeltawError as problem:
        raise of_error(problem, "lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
