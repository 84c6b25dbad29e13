"""The server's ASGI application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from deltaw.serve import api_openai, api_tools
from deltaw.serve.refuse import error_body
from deltaw.serve.served import Served
from deltaw.serve.serving import Serving
from deltaw.serve.settings import ServerSettings
from deltaw.serve.wire import Wire

CODES = {"extra_forbidden": "unknown_field", "not_served": "not_served"}
API_VERSION = "1"
"""Of this API, in the OpenAPI page; not of the package."""


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error, as OpenAI's clients read it."""

    error: ErrorDetail


def make_app(served: Served, settings: ServerSettings | None = None) -> FastAPI:
    """The application that serves `served`; `app.state.serving` holds its state.

    No page of it loads anything from elsewhere: the schema is at /openapi.json, there is no browser for it.
    Raises ServeError, NotFound for a key file that cannot be read.
    """
    settings = settings or ServerSettings()
    app = FastAPI(
        title="deltaw",
        version=API_VERSION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody, "description": "Refused, with the reason."}},
    )
    app.state.serving = serving = Serving(served, settings)
    app.include_router(api_openai.router)
    app.include_router(api_tools.router)
    if settings.admin_sha256 is not None:
        app.include_router(api_tools.admin_router)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Wire, serving=serving, routes=list(app.openapi()["paths"]))
    return app


async def _refused(_: Request, problem: Exception) -> JSONResponse:
    assert isinstance(problem, HTTPException)
    detail: Any = problem.detail
    body = detail if isinstance(detail, dict) else error_body(problem.status_code, str(detail))
    return JSONResponse(body, problem.status_code, problem.headers)


async def _invalid(_: Request, problem: Exception) -> JSONResponse:
    """The first thing that is wrong with a body, by the name of its field."""
    assert isinstance(problem, RequestValidationError)
    first = problem.errors()[0]
    places = [
        str(part) for part in first["loc"][1:] if not str(part).startswith(("function-", "constrained-", "list["))
    ]
    param = first.get("ctx", {}).get("field") or ".".join(places) or None
    code = CODES.get(first["type"], "invalid_value")
    if code == "unknown_field":
        message = f"{param} is no field of this request that is served here: leave it out."
    else:
        message = str(first["msg"]).removeprefix("Value error, ")
        message = message if first["type"] == "not_served" else f"{param or 'body'}: {message}"
    return JSONResponse(error_body(400, message[:1000], code, param), 400)
