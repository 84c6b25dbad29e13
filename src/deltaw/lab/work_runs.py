"""The workbench's runs: begin, watch, stop, go on, compare.

    GET  /runs                   every run
    POST /runs                   {"name", "recipe"}: begin it, or let it wait
    GET  /runs/NAME              one run, with its recipe
    GET  /runs/NAME/events       its events as they are written (text/event-stream)
    POST /runs/NAME/stop         after the present step, with a checkpoint
    POST /runs/NAME/resume       go on from the last checkpoint
    GET  /compare?runs=a,b       curves, settings that differ, final numbers

An event's id is a place in the run's metrics.jsonl and a check of the line before it, so that a page that was cut off
goes on from there; a file that was cut back by a resume makes it begin again: {"event": "again"}. {"event": "state"}
tells what `Runs.state` says, whenever that changes.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from deltaw.errors import BadInput
from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk
from deltaw.lab.run_files import Plain, RunFiles, event_of
from deltaw.lab.runs import Runs

LOOK_S, IDLE_S, PING_S = 0.25, 1.0, 10.0
MOST = 8
"""Runs that are compared at once: as many as there are colours that everybody tells apart."""


class NewRun(BaseModel):
    """What begins a run: its name, and a recipe as plain data."""

    model_config = ConfigDict(extra="forbid")

    name: str
    recipe: dict[str, Any]


def router(lab: Lab, desk: Desk) -> APIRouter:
    """The routes of runs, for the folder of a desk."""
    runs, routes = Runs(desk.runs), APIRouter()
    runs.wait_again()

    @routes.get("/runs")
    def every() -> dict[str, Any]:
        return {"runs": runs.all(), "folder": str(desk.runs)}

    @routes.post("/runs")
    def begin(new: NewRun) -> Plain:
        runs.start(new.name, new.recipe)
        return runs.one(new.name)

    @routes.get("/runs/{name}")
    def one(name: str) -> Plain:
        return runs.one(name)

    @routes.post("/runs/{name}/stop")
    def stop(name: str) -> Plain:
        runs.stop(name)
        return runs.one(name)

    @routes.post("/runs/{name}/resume")
    def resume(name: str) -> Plain:
        runs.resume(name)
        return runs.one(name)

    @routes.get("/runs/{name}/events")
    def events(name: str, request: Request) -> StreamingResponse:
        path = runs.files.find(name) / "metrics.jsonl"
        told = told_events(runs, name, path, request.headers.get("last-event-id", ""))
        return StreamingResponse(told, media_type="text/event-stream")

    @routes.get("/compare")
    def compare(runs: str) -> Plain:
        return compared(RunFiles(desk.runs), [name for name in runs.split(",") if name])

    return routes


class Tail:
    """The lines of a file that grows, from a place in it: `at` bytes, after a line with the checksum `check`."""

    def __init__(self, path: Path, last_id: str = "") -> None:
        self.path = path
        at, _, check = last_id.partition("-")
        self.at, self.check = (int(at), int(check)) if at.isdecimal() and check.isdecimal() else (0, 0)

    def read(self) -> tuple[bool, list[tuple[str, str]]]:
        """(whether the file is another one than was read so far, and everything is told again; [(id, line)])."""
        try:
            file = open(self.path, "rb")  # noqa: SIM115  (closed below)
        except OSError:
            return False, []
        with file:
            again = self.at > 0 and not self._as_before(file)
            if again:
                self.at = self.check = 0
            file.seek(self.at)
            lines = file.read().split(b"\n")[:-1]
        found = []
        for line in lines:
            self.at, self.check = self.at + len(line) + 1, zlib.crc32(line)
            if (told := event_of(line)) is not None:
                found.append((f"{self.at}-{self.check}", json.dumps(told)))
        return again, found

    def _as_before(self, file: Any) -> bool:
        """Whether the line that ends at `at` is the one that was read."""
        back = min(self.at, 65536)
        file.seek(self.at - back)
        before = file.read(back)
        return before.endswith(b"\n") and zlib.crc32(before[:-1].rpartition(b"\n")[2]) == self.check


async def told_events(runs: Runs, name: str, path: Path, last_id: str) -> AsyncIterator[str]:
    """A run's events and states as server-sent events, as long as somebody listens."""
    tail, known, quiet = Tail(path, last_id), None, 0.0
    while True:
        state = await asyncio.to_thread(runs.state, name)
        again, lines = await asyncio.to_thread(tail.read)
        said = 'data: {"event": "again"}\n\n' if again else ""
        said += "".join(f"id: {at}\ndata: {line}\n\n" for at, line in lines)
        if state != known:
            said += f"data: {json.dumps({'event': 'state', **state})}\n\n"
            known = state
        if said:
            yield said
            quiet = 0.0
        elif quiet >= PING_S:  # tells whether somebody is still there
            yield ": \n\n"
            quiet = 0.0
        pause = LOOK_S if state["state"] in ("running", "waiting") else IDLE_S
        await asyncio.sleep(pause)
        quiet += pause


def compared(files: RunFiles, names: list[str]) -> Plain:
    """Runs beside each other: curves, settings that differ as [{"key", "values"}], and facts.

    Raises NotFound for a name, BadInput for none or too many.
    """
    if not names or len(names) > MOST:
        raise BadInput(f"compare takes 1 to {MOST} runs, not {len(names)}.")
    names = list(dict.fromkeys(names))
    for name in names:
        files.find(name)
    flat = [_flat(files.settings(name)) for name in names]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    differ = [
        {"key": key, "values": [one.get(key) for one in flat]}
        for key in keys
        if len({json.dumps(one.get(key), sort_keys=True) for one in flat}) > 1
    ]
    return {"runs": [files.facts(n) | files.series(n) for n in names], "differ": differ}


def _flat(plain: Plain, path: str = "") -> Plain:
    found: Plain = {}
    for key, value in plain.items():
        where = f"{path}{key}"
        found |= _flat(value, f"{where}.") if isinstance(value, dict) and value else {where: value}
    return found
