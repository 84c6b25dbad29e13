"""What stands around every request: id, key, body limits, slow clients, the log, metrics."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaw.serve.keys import Key, is_key
from deltaw.serve.refuse import error_body, refused
from deltaw.serve.serving import LOG, Serving

OPEN = ("/health", "/ready", "/metrics")  # no key is asked for: they hold no names and no texts
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PORT = re.compile(r":\d+$")
_JSON = re.compile(r"application/(?:[\w.-]+\+)?json\s*(?:;.*)?", re.IGNORECASE)


class Wire:
    """An ASGI middleware."""

    def __init__(self, app: ASGIApp, serving: Serving, routes: Sequence[str]) -> None:
        self.app, self.serving = app, serving
        self.routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        watched = _Watched(self.serving, scope, send)
        try:
            await self._handle(scope, receive, watched)
        except HTTPException as problem:
            await watched.refuse(scope, receive, problem)
        except Exception as problem:
            if watched.status is not None and isinstance(problem, TimeoutError):
                watched.note["gone"] = True  # it took no byte for send_s; the connection is closed, for want of an end
                return
            LOG.exception("request %s failed", watched.request_id)
            if watched.status is not None:
                raise
            message = f"The server failed; its log has the request {watched.request_id}."
            await watched.refuse(scope, receive, refused(500, message, "internal_error"))
        finally:
            watched.log(self._route(scope["path"]))

    def _route(self, path: str) -> str:
        return path if path in self.routes else "/v1/models/{model}" if path.startswith("/v1/models/") else "other"

    async def _handle(self, scope: Scope, receive: Receive, watched: _Watched) -> None:
        headers = Headers(scope=scope)
        scope.setdefault("state", {})
        scope["state"] |= {"request_id": watched.request_id, "note": watched.note}
        path = scope["path"]
        self._check_host(headers)
        key = None if path in OPEN else self._key(path, headers)
        scope["state"]["key"] = key
        watched.note |= {} if key is None else {"key": key.name}
        if self.serving.admission.is_draining and path not in OPEN:
            raise refused(503, "The server is shutting down.", "draining", headers={"Retry-After": "5"})
        if scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            receive = await self._with_body(scope, headers, receive)
        await self.app(scope, receive, watched.send)

    def _check_host(self, headers: Headers) -> None:
        """Raise the refusal 421 for a Host that this server is not called by."""
        hosts = self.serving.settings.hosts
        named = _PORT.sub("", headers.get("host", "")).lower()
        if hosts is not None and named not in hosts:
            message = f"This server is not called {named[:100]!r}: use {hosts[0]}, or start it with --allow-host."
            raise refused(421, message, "unknown_host")

    def _key(self, path: str, headers: Headers) -> Key | None:
        """Who asks. Raises the refusals 401, 403 and 404."""
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        admin = self.serving.settings.admin_sha256
        if admin is not None and secret and is_key(secret, admin):
            return None
        if path in ADMIN:
            if admin is None:
                raise refused(404, "Not Found", "not_found")
            raise _unknown("This route needs the admin key.")
        if self.serving.keys is None:
            return None
        found = self.serving.keys.find(secret) if secret else None
        if self.serving.keys.problem is not None:
            LOG.error("the keys are as they were: %s", self.serving.keys.problem)
        if found is None:
            raise _unknown("Give a key that this server knows: Authorization: Bearer KEY.")
        return found

    async def _with_body(self, scope: Scope, headers: Headers, receive: Receive) -> Receive:
        """The body, read in time and within its limit. Raises the refusals 408, 413, 415."""
        most = self.serving.settings.max_body_bytes
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self.serving.settings.body_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return _replayed(message, receive)
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(most)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise refused(408, "The body did not come in time.", "timeout", headers={"Connection": "close"}) from None
        if body and not _JSON.fullmatch(headers.get("content-type", "")):
            raise refused(415, "Send JSON: Content-Type: application/json.", "not_json")
        return _replayed({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _unknown(message: str) -> HTTPException:
    return refused(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _too_large(most: int) -> HTTPException:
    return refused(413, f"The body is larger than {most} bytes.", "too_large", headers={"Connection": "close"})


def _replayed(first: Message, then: Receive) -> Receive:
    """A receive that gives `first`, then what comes."""
    kept = [first]

    async def receive() -> Message:
        return kept.pop() if kept else await then()

    return receive


class _Watched:
    """The response of one request: its id in the header, its status for the log, a limit on standing still."""

    def __init__(self, serving: Serving, scope: Scope, send: Send) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        self.status: int | None = None
        self.note: dict[str, Any] = {}
        self._began_s = time.perf_counter()
        self._serving, self._scope, self._send = serving, scope, send

    async def send(self, message: Message) -> None:
        """Pass a message on. Raises TimeoutError when the client takes none for send_s."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        async with asyncio.timeout(self._serving.settings.send_s):
            await self._send(message)

    async def refuse(self, scope: Scope, receive: Receive, problem: HTTPException) -> None:
        """Send a refusal."""
        if self.status is None:
            body = (
                problem.detail if isinstance(problem.detail, dict) else error_body(problem.status_code, problem.detail)
            )
            await JSONResponse(body, problem.status_code, problem.headers)(scope, receive, self.send)

    def log(self, route: str) -> None:
        """One line, and one count."""
        self._serving.metrics.requests.labels(route, str(self.status or 499)).inc()
        took_ms = round((time.perf_counter() - self._began_s) * 1e3, 1)
        told = {"method": self._scope["method"], "path": self._scope["path"], "status": self.status, "ms": took_ms}
        LOG.info("request", extra={"told": {"request_id": self.request_id, **told, **self.note}})
