"""The workbench's form of a recipe: its fields, files of rows, and the plan of what is composed.

    GET  /train/form    sections, fields and methods (forms.py); the base of this lab
    POST /train/plan    {"recipe"}: the plan (plans.py), and the recipe as YAML
    GET  /data          files of rows that are kept
    POST /data          {"name", "text"}: keep one; a wrong line is named

A recipe that cannot be is 422: {"detail": the library's sentence, "fields": paths that it is about}.
"""

from __future__ import annotations

import json
from typing import Any

from anyio.to_thread import run_sync as to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from deltaw.errors import BadInput
from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk
from deltaw.lab.forms import blamed, recipe_form
from deltaw.lab.plans import Plans
from deltaw.lab.rows import MOST_BYTES, keep_rows, kept_rows
from deltaw.lab.runs import recipe_text


class Composed(BaseModel):
    """A recipe as plain data."""

    model_config = ConfigDict(extra="forbid")

    recipe: dict[str, Any]


def router(lab: Lab, desk: Desk) -> APIRouter:
    """The routes of the form, for a desk."""
    routes, plans, form = APIRouter(), Plans(), recipe_form()

    @routes.get("/train/form")
    def fields() -> dict[str, Any]:
        return {**form, "base": lab.base, "runs": str(desk.runs)}

    @routes.post("/train/plan", response_model=None)
    def plan(given: Composed) -> dict[str, Any] | JSONResponse:
        text = recipe_text(given.recipe)
        try:
            return {**plans.plan(given.recipe), "yaml": text}
        except BadInput as problem:
            fields = blamed(str(problem), _paths(form, given.recipe))
            return JSONResponse({"detail": str(problem), "fields": fields, "yaml": text}, 422)

    @routes.get("/data")
    def every() -> dict[str, Any]:
        return {"files": kept_rows(desk.data), "folder": str(desk.data), "most_bytes": MOST_BYTES}

    @routes.post("/data")
    async def keep(request: Request) -> dict[str, Any]:
        given = await _body(request)
        if set(given) != {"name", "text"} or not all(isinstance(v, str) for v in given.values()):
            raise BadInput('a file of rows is given as {"name": ..., "text": ...}.')
        return await to_thread(keep_rows, desk.data, given["name"], given["text"])

    return routes


def _paths(form: dict[str, Any], recipe: dict[str, Any]) -> list[str]:
    """The paths of all fields that the form has for a recipe."""
    adapter = recipe.get("adapter")
    method = adapter.get("method") if isinstance(adapter, dict) else None
    parts = [*form["sections"], *(m for m in form["methods"] if m["name"] == method)]
    return [f["path"] for part in parts for f in [*part["fields"], *part.get("shared", [])]]


async def _body(request: Request) -> dict[str, Any]:
    """A request's JSON object; what is too large is not read to its end. Raises BadInput."""
    read = bytearray()
    async for part in request.stream():
        read += part
        if len(read) > 2 * MOST_BYTES:  # JSON writes quotes and lines longer
            break
    try:
        given = json.loads(read) if len(read) <= 2 * MOST_BYTES else None
    except (ValueError, RecursionError):
        raise BadInput("the request is no JSON.") from None
    if given is not None and not isinstance(given, dict):
        raise BadInput("the request is no JSON object.")
    if given is None or len(str(given.get("text", "")).encode("utf-8", "replace")) > MOST_BYTES:
        raise BadInput(
            f"the file is larger than {MOST_BYTES / 1e6:.0f} MB: put it into the folder of data yourself, or name its "
            "path in a recipe of your own."
        )
    return dict(given)
