"""The workbench's registry: names, versions, lineage, differences; promote, roll back, add.

    GET  adapters?search=&page=        names, 25 a page, the current version of each
    GET  adapters/NAME                 its versions, lineage, labels and everything that happened to them
    GET  adapters/NAME/diff?a=1&b=2    what differs between two versions
    POST adapters/add                  {"name", "run"}
    POST adapters/NAME/promote         {"version", "label", "gate"}; gate: with the last gate of this name and label
    POST adapters/NAME/rollback        {"label"}

A browser can ask for the gate that a name has, and never names a command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import Field

from deltaw.core.fingerprint import BaseFingerprint
from deltaw.diagnose.report import json_safe
from deltaw.errors import NotFound, RegistryError
from deltaw.lab.base import Lab
from deltaw.lab.controls import Controls, read
from deltaw.lab.desk import Desk
from deltaw.lab.picture import Plain
from deltaw.lab.shelf import find_run, has_registry, open_registry, run_names
from deltaw.store.references import CURRENT, check_name

if TYPE_CHECKING:
    from deltaw.store.registry import Registry

PER_PAGE = 25
IN_FULL = 40
"""The newest versions of a name that are told in full; of older ones the page has label, method, metrics and date."""
MOST_CHILDREN = 8
"""Of one version, that are told."""


class Listed(Controls):
    """Which names."""

    search: str = Field("", max_length=100)
    page: int = Field(1, ge=1, le=10**6)


class Two(Controls):
    """Two versions."""

    a: int = Field(ge=1, le=10**9)
    b: int = Field(ge=1, le=10**9)


class Added(Controls):
    """An adapter of a run, and its name."""

    name: str = Field(max_length=200)
    run: str = Field(max_length=300)


class Promoted(Controls):
    """A version and its label to be."""

    version: int = Field(ge=1, le=10**9)
    label: str = Field(CURRENT, max_length=100)
    gate: bool = False


class RolledBack(Controls):
    """A label."""

    label: str = Field(CURRENT, max_length=100)


def router(lab: Lab, desk: Desk) -> APIRouter:
    """The routes of the registry's pages."""
    made = APIRouter()

    @made.get("/adapters")
    def names(request: Request) -> JSONResponse:
        return JSONResponse(json_safe(listed(lab, desk, read(Listed, request.query_params))))

    @made.get("/adapters/{name}")
    def one(name: str) -> JSONResponse:
        return JSONResponse(json_safe(shown(open_registry(desk), name)))

    @made.get("/adapters/{name}/diff")
    def diff(name: str, request: Request) -> JSONResponse:
        check_name(name)
        two: Any = read(Two, request.query_params)
        return JSONResponse(json_safe(open_registry(desk).diff(f"{name}@{two.a}", f"{name}@{two.b}")))

    @made.post("/adapters/add")
    def add(given: dict[str, Any]) -> JSONResponse:
        asked: Any = read(Added, given)
        check_name(asked.name)
        folder = find_run(desk, asked.run)
        return JSONResponse(open_registry(desk, create=True).add(asked.name, folder))

    @made.post("/adapters/{name}/promote")
    def promote(name: str, given: dict[str, Any]) -> JSONResponse:
        check_name(name)
        asked: Any = read(Promoted, given)
        registry = open_registry(desk)
        gate = registry.last_gate(name, asked.label) if asked.gate else None
        if asked.gate and gate is None:
            raise RegistryError(f"{name}@{asked.label} has met no gate yet: promote once with one (deltaw adapters).")
        return JSONResponse(json_safe(registry.promote(f"{name}@{asked.version}", asked.label, gate)))

    @made.post("/adapters/{name}/rollback")
    def rollback(name: str, given: dict[str, Any]) -> JSONResponse:
        asked: Any = read(RolledBack, given)
        return JSONResponse(open_registry(desk).rollback(name, asked.label))

    return made


def listed(lab: Lab, desk: Desk, asked: Any) -> Plain:
    """One page of the names that hold the search's words, each with its current version's facts."""
    about = {"registry": str(desk.registry), "runs": run_names(desk, with_adapter=True), "per_page": PER_PAGE}
    if not has_registry(desk):
        return {**about, "exists": False, "total": 0, "all": 0, "page": 1, "rows": []}
    registry = open_registry(desk)
    every = registry.listing(lab.model.fingerprint)
    words = asked.search.lower().split()
    hits = [r for r in every if all(any(w in text for text in _texts(r)) for w in words)]
    page = min(asked.page, max(1, -(-len(hits) // PER_PAGE)))
    rows = [_detailed(registry, r) for r in hits[(page - 1) * PER_PAGE : page * PER_PAGE]]
    return {**about, "exists": True, "total": len(hits), "all": len(every), "page": page, "rows": rows}


def _texts(row: dict[str, Any]) -> list[str]:
    """What a search looks at: name, labels, method, base, id."""
    texts = [row["name"], *row["labels"], row["method"], row["base"], row["id"]]
    return [str(text).lower() for text in texts if text]


def _detailed(registry: Registry, row: dict[str, Any]) -> Plain:
    """A row with what its version tells: metrics, and where it comes from. Without `current` it is the newest's."""
    at = row["labels"].get(CURRENT, row["newest"])
    try:
        told = registry.show(f"{row['name']}@{at}")
    except NotFound:  # removed between the two looks
        return {**row, "shown": at, "metrics": None, "parents": []}
    facts = {k: told[k] for k in ("id", "method", "n_parameters", "bytes", "added", "metrics")}
    return {**row, **facts, "base": _base(told), "shown": at, "parents": _parents(registry, told)}


def _base(told: dict[str, Any]) -> str | None:
    return None if told["base"] is None else BaseFingerprint(**told["base"]).short()


def _parents(registry: Registry, told: dict[str, Any]) -> list[Plain]:
    """What a version was made from: {"id", "names", "how"}."""
    return [
        {"id": parent, "names": names, "how": _how(registry, told, names)} for parent, names in told["parents"].items()
    ]


def _how(registry: Registry, told: dict[str, Any], relatives: list[str]) -> str:
    """ "re-adapted from" where a parent or child (`relatives`: its names) belongs to another base, else "made from"."""
    base = registry.show(relatives[0])["base"] if relatives else None
    is_other = base is not None and told["base"] is not None and base["weights"] != told["base"]["weights"]
    return "re-adapted from" if is_other else "made from"


def shown(registry: Registry, name: str) -> Plain:
    """A name: versions (the newest first), what they come from and led to, labels, gates, and the audit trail."""
    check_name(name)
    told = registry.show(name)
    versions = []
    for n, row in enumerate(reversed(told["versions"])):
        if n >= IN_FULL:
            versions.append({**row, "full": False})
            continue
        more = registry.show(f"{name}@{row['version']}")
        facts = {k: more[k] for k in ("n_parameters", "bytes", "date", "gates")}
        facts["children"] = [{"name": c, "how": _how(registry, more, [c])} for c in more["children"][:MOST_CHILDREN]]
        versions.append({**row, **facts, "base": _base(more), "parents": _parents(registry, more), "full": True})
    on = {label: row["version"] for row in told["versions"] for label in row["labels"]}
    gates = {label: registry.last_gate(name, label) for label in {CURRENT, *on}}
    asked = {
        label: {"command": g.command, "min_gain": g.min_gain, "min_value": g.min_value}
        for label, g in gates.items()
        if g is not None
    }
    return {"name": name, "labels": on, "versions": versions, "gates": asked, "trail": _trail(told, versions)}


def _trail(told: dict[str, Any], versions: list[Plain]) -> list[Plain]:
    """Moves of labels and gates that were met, the newest first."""
    moves = [{"kind": "move", **m} for m in told["history"]]
    met = [{"kind": "gate", "version": v["version"], **g} for v in versions for g in v.get("gates", [])]
    return sorted([*met, *moves], key=lambda e: str(e["at"]))[::-1]  # a gate comes before the move of its second
