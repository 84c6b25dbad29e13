"""Is every adapter in a registry what was stored, and does the index hold together?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from deltaw.errors import DeltawError
from deltaw.store import catalog
from deltaw.store.index import adapters, labels, names, versions
from deltaw.store.leases import registry_lock
from deltaw.store.objects import damage, object_folder, object_ids
from deltaw.store.peft import read_adapter

if TYPE_CHECKING:
    from deltaw.store.registry import Registry


def verify(registry: Registry) -> dict[str, Any]:
    """Check every adapter that a version holds, and the index. Other processes may be at work meanwhile.

    sound         nothing is damaged and the index holds together
    damaged       [{"id", "why", "versions": ["name@3"]}]: bytes that are not those stored, or whose id is another
    problems      sentences about the index
    checked       how many adapters were read
    unreferenced  folders that gc would delete
    """
    with registry.index.reading() as db:
        held = set(db.scalars(select(versions.c.adapter)))
    damaged = []
    for adapter_id in sorted(held):
        if _why(registry, adapter_id) is None:
            continue
        with registry_lock(registry.root):  # again, when nobody can be mending or removing it
            with registry.index.reading() as db:
                by = catalog.holders(db, adapter_id)
            if by and (why := _why(registry, adapter_id)):
                damaged.append({"id": adapter_id, "why": why, "versions": by})
    problems = _problems(registry)
    with registry.index.reading() as db:
        loose = object_ids(registry.root) - catalog.wanted(db)
    return {
        "sound": not damaged and not problems,
        "damaged": damaged,
        "problems": problems,
        "checked": len(held),
        "unreferenced": len(loose),
    }


def _why(registry: Registry, adapter_id: str) -> str | None:
    """What is wrong with an adapter, its id worked out again from its tensors; None when nothing is."""
    with registry.index.reading() as db:
        manifest = db.scalar(select(adapters.c.manifest).where(adapters.c.id == adapter_id))
    folder = object_folder(registry.root, adapter_id)
    if found := damage(folder, adapter_id, manifest):
        return found
    try:
        read = read_adapter(folder).id
    except DeltawError as problem:
        return f"it cannot be read ({problem})"
    return None if read == adapter_id else f"its content has the id {read[:12]}"


def _problems(registry: Registry) -> list[str]:
    found = [] if (bad := registry.index.integrity()) is None else [f"SQLite finds its file damaged: {bad}"]
    with registry.index.reading() as db:
        there = {(n, v) for n, v in db.execute(select(versions.c.name, versions.c.version))}
        for name, label, version in db.execute(select(labels.c.name, labels.c.label, labels.c.version)):
            if (name, version) not in there:
                found.append(f"{name}@{label} is on version {version}, which is not there")
        known = set(db.scalars(select(adapters.c.id)))
        found += [f"{i[:12]} has a version but no entry" for i in set(db.scalars(select(versions.c.adapter))) - known]
        newest = select(versions.c.name, func.max(versions.c.version)).group_by(versions.c.name)
        last = {n: v for n, v in db.execute(select(names.c.name, names.c.last_version))}
        found += [f"{n} would give version {v} again" for n, v in db.execute(newest) if last.get(n, 0) < v]
    return found
