"""The workbench's tables: what the bench measured of methods and memory. tables.json is made by bench/lab_tables.py."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk
from deltaw.lab.picture import Plain

TABLES = Path(__file__).resolve().parent / "tables.json"


@cache
def tables() -> Plain:
    """The tables as they came with the package."""
    found: Plain = json.loads(TABLES.read_text(encoding="ascii"))
    return found


def router(lab: Lab, desk: Desk) -> APIRouter:
    """One route: they are of the bench's base and machines, whatever base this lab has."""
    made = APIRouter()

    @made.get("/tables")
    def every() -> JSONResponse:
        return JSONResponse(tables())

    return made
