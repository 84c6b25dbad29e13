"""The workbench: pages around the pictures, each with a router of its own."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from deltaw.lab import work_adapters, work_ask, work_diagnose, work_runs, work_tables, work_train
from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk

_ROUTERS: tuple[Callable[[Lab, Desk], APIRouter], ...] = (
    work_train.router,
    work_runs.router,
    work_adapters.router,
    work_diagnose.router,
    work_ask.router,
    work_tables.router,
)


def routers(lab: Lab, desk: Desk) -> list[APIRouter]:
    """What is answered under /api/work, for a lab and the place where its work lies."""
    return [make(lab, desk) for make in _ROUTERS]
