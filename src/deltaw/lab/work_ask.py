"""The playground's routes.

GET  ask/choices?search=    who can be asked
POST ask                    a prompt: server-sent events (playground.py), one JSON object each; leaving ends it
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from deltaw.lab.base import Lab
from deltaw.lab.controls import Controls, read
from deltaw.lab.desk import Desk
from deltaw.lab.picture import Plain
from deltaw.lab.playground import MOST_COLUMNS, Asked, Playground
from deltaw.lab.shelf import has_registry, open_registry, run_names

MOST_NAMES = 40
LONGEST = 512


class Search(Controls):
    """Which names."""

    search: str = Field("", max_length=100)


class Prompt(Controls):
    """One prompt, and who answers it."""

    prompt: str = Field(min_length=1, max_length=8000)
    adapters: tuple[Annotated[str, Field(max_length=300)], ...] = Field(min_length=1, max_length=MOST_COLUMNS)
    max_tokens: int = Field(64, ge=1, le=LONGEST)
    temperature: float = Field(0.0, ge=0, le=5, allow_inf_nan=False)
    seed: int = Field(0, ge=0, lt=2**53)
    chat: bool = False


def router(lab: Lab, desk: Desk) -> APIRouter:
    """The routes of the playground; its engine ends with the application."""
    playground = Playground(lab, desk)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        playground.close()

    made = APIRouter(lifespan=life)

    @made.get("/ask/choices")
    def who(request: Request) -> JSONResponse:
        asked: Any = read(Search, request.query_params)
        return JSONResponse(choices(lab, desk, asked.search))

    @made.post("/ask")
    def ask(given: dict[str, Any]) -> StreamingResponse:
        asked = Asked(**read(Prompt, given).model_dump())
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(_lines(playground, asked), media_type="text/event-stream", headers=headers)

    return made


def choices(lab: Lab, desk: Desk, search: str) -> Plain:
    """Who can be asked: adapters given to the lab, runs, and names of the registry that hold the search's words."""
    words = search.lower().split()
    listing = open_registry(desk).listing(lab.model.fingerprint) if has_registry(desk) else []
    fits = [
        {"name": r["name"], "labels": r["labels"], "newest": r["newest"], "fits": r.get("fits")}
        for r in listing
        if all(w in r["name"].lower() for w in words)
    ]
    return {
        "base": lab.label,
        "given": sorted(lab.given),
        "runs": run_names(desk, with_adapter=True),
        "registry": fits[:MOST_NAMES],
        "more": max(0, len(fits) - MOST_NAMES),
        "most": MOST_COLUMNS,
        "longest": LONGEST,
        "has_template": bool(getattr(lab.model.tokenizer, "chat_template", None)),
    }


async def _lines(playground: Playground, asked: Asked) -> AsyncIterator[str]:
    answers = playground.answer(asked)
    try:
        async for told in answers:
            yield f"data: {json.dumps(told)}\n\n"
    finally:
        await answers.aclose()  # type: ignore[attr-defined]
