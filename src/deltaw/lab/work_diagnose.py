"""The workbench's diagnosis: the findings of `deltaw diagnose` with what they stand on, for the page to draw.

    GET  diagnose/subjects                 runs, and names of the registry
    GET  diagnose?run=NAME|adapter=REF     what the log and the adapter tell by themselves, and how the slow checks are
    POST diagnose/start                    {"run" or "adapter", "check", "rank", "on_lab_base"}
    POST diagnose/stop                     the same

Slow checks: "base" (norms of the weights, merging), "forgetting", "rank" (the run again, with another rank).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from deltaw.diagnose.diagnose import Diagnosis, diagnose
from deltaw.diagnose.findings import FLAT
from deltaw.diagnose.report import CAPTIONS, json_safe
from deltaw.errors import BadInput
from deltaw.lab.base import Lab
from deltaw.lab.checks import Checks
from deltaw.lab.controls import Controls, read
from deltaw.lab.desk import Desk
from deltaw.lab.picture import Plain
from deltaw.lab.shelf import find_run, has_registry, open_registry, run_names
from deltaw.store.peft import TENSORS

CHECKS = ("base", "forgetting", "rank")
MOST_POINTS = 2000
"""Steps that the loss curve is drawn with; of a longer run every n-th."""
MOST_NAMES = 200


class Subject(Controls):
    """What is looked at: a run, or an adapter of the registry."""

    run: str = Field("", max_length=300)
    adapter: str = Field("", max_length=300)


class SlowCheck(Subject):
    """A slow check of it. rank: what "rank" tries; on_lab_base: measured on the lab's base, not the one it names."""

    check: Literal["base", "forgetting", "rank"] = "base"
    rank: int = Field(32, ge=1, le=4096)
    on_lab_base: bool = False


def router(lab: Lab, desk: Desk) -> APIRouter:
    """The routes of the diagnosis; what still runs ends with the application."""
    checks = Checks()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        checks.stop_all()

    made = APIRouter(lifespan=life)

    @made.get("/diagnose/subjects")
    def subjects() -> JSONResponse:
        names = [r["name"] for r in open_registry(desk).listing()] if has_registry(desk) else []
        return JSONResponse({"runs": run_names(desk), "adapters": names[:MOST_NAMES], "more": len(names) > MOST_NAMES})

    @made.get("/diagnose")
    def look(request: Request) -> JSONResponse:
        path = folder_of(desk, read(Subject, request.query_params))
        found = lab.keep(("diagnosis", *_stamp(path)), lambda: diagnose(path, alone=True))
        slow = {name: check.plain() for name in CHECKS if (check := checks.get((name, *_stamp(path)))) is not None}
        return JSONResponse(json_safe({**drawable(found), "slow": slow}))

    @made.post("/diagnose/start")
    def start(given: dict[str, Any]) -> JSONResponse:
        asked: Any = read(SlowCheck, given)
        path = folder_of(desk, asked)
        words = ["diagnose", str(path), "--json", *(["--base", lab.base] if asked.on_lab_base else [])]
        words += {"base": [], "forgetting": ["--forgetting"], "rank": ["--try-rank", str(asked.rank)]}[asked.check]
        return JSONResponse(json_safe(checks.start((asked.check, *_stamp(path)), words).plain()))

    @made.post("/diagnose/stop")
    def stop(given: dict[str, Any]) -> JSONResponse:
        asked: Any = read(SlowCheck, given)
        check = checks.get((asked.check, *_stamp(folder_of(desk, asked))))
        if check is None:
            raise BadInput(f"The check {asked.check!r} of this was never begun.")
        check.stop()
        return JSONResponse(json_safe(check.plain()))

    return made


def folder_of(desk: Desk, asked: Any) -> Path:
    """The folder of a run, or the checked one of an adapter. Raises NotFound, RegistryError, BadInput."""
    if bool(asked.run) == bool(asked.adapter):
        raise BadInput("Say what to look at: run=NAME or adapter=NAME@VERSION.")
    return find_run(desk, asked.run) if asked.run else open_registry(desk).folder(asked.adapter)


def _stamp(path: Path) -> tuple[Any, ...]:
    """What changes with the files that a diagnosis reads."""
    files = (path / "run.json", path / "metrics.jsonl", path / "done.json", path / TENSORS, path / "adapter" / TENSORS)
    return str(path), *((f.stat().st_mtime_ns, f.stat().st_size) if f.is_file() else None for f in files)


def drawable(found: Diagnosis) -> Plain:
    """A diagnosis with the points of its loss curve, and the captions and limits that its report has."""
    steps = found.log.steps if found.log is not None else ()
    every = max(1, -(-len(steps) // MOST_POINTS))
    return {
        **found.as_dict(),
        "name": Path(found.path).name,
        "steps": [[s.step, s.loss, s.lr] for s in steps[::every]],
        "n_steps": found.log.n_steps if found.log is not None else None,
        "captions": CAPTIONS,
        "flat": FLAT,
    }
