"""The lab's server: the page, the pictures' data, the workbench, and who may ask.

    GET  /                       the page and its assets
    GET  /api/pictures           what frames need: words, controls
    GET  /api/pictures/N?...     numbers and data at these controls
    POST /api/pictures/N         9: train up to a step; 10: answer a prompt. A JSON object of controls
         /api/work/...           the workbench (workbench.py), where the lab has a desk

Only the page's own origin may post (Origin or Sec-Fetch-Site), and only names of this machine are answered to when
bound to loopback, so that another site cannot reach it through a name of its own. An error is {"detail": a sentence}.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from deltaw.errors import DeltawError, NotFound, WorkFailed
from deltaw.lab.ahead import FIRST_S, Ahead, jobs_of
from deltaw.lab.base import Lab
from deltaw.lab.controls import read
from deltaw.lab.desk import Desk
from deltaw.lab.picture import Picture, Plain
from deltaw.lab.pictures import pictures_of
from deltaw.lab.workbench import routers
from deltaw.ops.native.library import and_end_threads
from deltaw.serve.hosts import is_loopback

ASSETS = Path(__file__).resolve().parent / "assets"
POLICY = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
LOCAL = ("localhost", "127.0.0.1", "::1")


def shown(lab: Lab, picture: Picture, given: Mapping[str, Any]) -> Plain:
    """A picture at these controls, or what is there of it (Picture.soon). What does not change is computed once.

    Raises BadInput with a sentence.
    """
    chosen = read(picture.controls, given)
    if picture.act is not None:  # it shows where something live stands
        with lab.lock:
            return picture.compute(lab, chosen)
    key = picture.number, chosen.model_dump_json()
    if picture.soon is None:
        return lab.keep(key, lambda: picture.compute(lab, chosen))
    found: Plain = lab.kept(key) or picture.soon(lab, chosen)
    return found if found["data"]["pending"] else lab.keep(key, lambda: found)


def make_app(
    base: str | Lab, adapters: Mapping[str, Path] | None = None, host: str = "127.0.0.1", desk: Desk | None = None
) -> FastAPI:
    """The lab of a base as an ASGI application.

    base      a folder, a hub id or a starter name; or a Lab
    adapters  name -> folder, attached beside the base
    host      the address that it will be bound to: on loopback, other names are refused
    desk      where the workbench keeps its things; None: the pictures alone

    Raises BaseError, AdapterError, BadInput: the base is loaded here.
    """
    lab = base if isinstance(base, Lab) else Lab(base, adapters)
    pictures = and_end_threads(lambda: pictures_of(lab))
    frames: dict[str, Any] = {"base": lab.label, "recorded": False, "workbench": desk is not None}
    frames["pictures"] = [p.plain() for p in pictures.values()]
    ahead = Ahead(lambda: jobs_of(lab, pictures), FIRST_S)
    app = FastAPI(title="deltaw lab", openapi_url=None, lifespan=ahead.beside)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = _refused(request, host)
        with ahead.asked():
            response = JSONResponse({"detail": refused}, 403) if refused else await call_next(request)
        response.headers.update(HEADERS)
        return response

    _explain(app)

    def find(n: str) -> Picture:
        if n not in map(str, pictures):
            raise NotFound(f"there is no picture {n[:20]}; they are numbered 1 to {len(pictures)}.")
        return pictures[int(n)]

    @app.get("/api/pictures")
    def every() -> JSONResponse:
        return JSONResponse(frames)

    @app.get("/api/pictures/{n}")
    def show(n: str, request: Request) -> JSONResponse:
        picture = find(n)
        return JSONResponse(and_end_threads(lambda: shown(lab, picture, dict(request.query_params))))

    @app.post("/api/pictures/{n}")
    def act(n: str, given: dict[str, Any]) -> JSONResponse:
        picture = find(n)
        if picture.act is None:
            return JSONResponse({"detail": f"picture {n} changes nothing: ask for it with GET."}, 405)
        act_on, chosen = picture.act, read(picture.controls, given)
        return JSONResponse(and_end_threads(lambda: act_on(lab, chosen)))

    for router in [] if desk is None else routers(lab, desk):
        app.include_router(router, prefix="/api/work")
    app.mount("/", StaticFiles(directory=ASSETS, html=True))
    return app


def _explain(app: FastAPI) -> None:
    """Let every failure be answered with a sentence."""

    @app.exception_handler(DeltawError)
    def explain(_: Request, problem: Exception) -> JSONResponse:
        status = 404 if isinstance(problem, NotFound) else 500 if isinstance(problem, WorkFailed) else 422
        return JSONResponse({"detail": str(problem).encode("utf-8", "replace").decode()}, status)

    @app.exception_handler(RequestValidationError)
    def unread(_: Request, problem: RequestValidationError) -> JSONResponse:
        first = problem.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:] if isinstance(part, str))
        detail = f"the request cannot be read: {f'{where}: ' if where else ''}{first['msg']}."
        return JSONResponse({"detail": detail}, 422)

    @app.exception_handler(UnicodeError)
    def unwritable(_: Request, problem: UnicodeError) -> JSONResponse:
        return JSONResponse(
            {"detail": "what was given holds half a character, which no file can keep: take it out."}, 422
        )

    @app.exception_handler(OSError)
    def refused(_: Request, problem: OSError) -> JSONResponse:
        where = f" ({str(problem.filename)[:300]})" if problem.filename else ""
        why = problem.strerror or type(problem).__name__
        return JSONResponse({"detail": f"the system says {why}{where}: mend that, and try again."}, 500)

    @app.exception_handler(Exception)
    def failed(_: Request, problem: Exception) -> JSONResponse:  # the traceback goes to the terminal
        why = f"the lab failed at this, which is a fault of the lab ({type(problem).__name__}: {str(problem)[:200]})"
        detail = f"{why}. What you wrote is still here; the lab's terminal tells more."
        return JSONResponse({"detail": detail.encode("utf-8", "replace").decode()}, 500, HEADERS)


def _refused(request: Request, host: str) -> str | None:
    """Why a request is not answered; None: it is."""
    own = request.headers.get("host", "")
    name = urlsplit(f"//{own}").hostname or ""
    if is_loopback(host) and name not in LOCAL and not is_loopback(name):
        return f"this lab answers to names of this machine only, not to {name!r}."
    fetched = request.headers.get("sec-fetch-site", "none")
    if request.url.path.startswith("/api/") and fetched not in ("same-origin", "none"):
        return "another site asks for this, and the lab answers to its own page only."
    if request.method in ("GET", "HEAD"):
        return None
    origin = request.headers.get("origin")
    same = urlsplit(origin).netloc == own if origin else fetched == "same-origin"
    if not same:
        return "this request does not come from the lab's own page, and it would change something."
    if not request.headers.get("content-type", "").startswith("application/json"):
        return "a request that changes something is JSON (content-type: application/json)."
    return None
