"""Refusals as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from starlette.exceptions import HTTPException

from deltaw.errors import BaseMismatch, DeltawError, NotFound, WorkFailed

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
TYPES |= {429: "rate_limit_error", 500: "server_error", 503: "server_error"}


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The body of an error."""
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def refused(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None
) -> HTTPException:
    """An exception that ends the request with this status and OpenAI's body."""
    body: Any = error_body(status, message, code, param)  # starlette's type knows text only
    return HTTPException(status, detail=body, headers=headers)


def of_error(problem: DeltawError, param: str | None = None) -> HTTPException:
    """The refusal for one of our own errors about what was asked for."""
    if isinstance(problem, NotFound):
        return refused(404, str(problem), "model_not_found", param)
    if isinstance(problem, WorkFailed):
        return refused(503, str(problem), "engine_failed", param, {"Retry-After": "5"})
    code = "base_mismatch" if isinstance(problem, BaseMismatch) else "invalid_value"
    return refused(400, str(problem), code, param)
