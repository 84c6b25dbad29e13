"""Labels on versions, and how they moved: promote, roll back, take off, and the gates that were met."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, delete, func, insert, select, update

from deltaw.errors import NotFound, RegistryError, WorkFailed
from deltaw.store.index import gates, labels, moves, now, versions
from deltaw.store.references import CANDIDATE, CURRENT

if TYPE_CHECKING:
    from deltaw.store.catalog import Version
    from deltaw.store.gate import Measured

ANYWHERE = -1
"""For `move`: wherever the label is now."""


def where(db: Connection, name: str, label: str) -> int | None:
    """The version that a label is on; None when it is on none."""
    return db.scalar(select(labels.c.version).where(labels.c.name == name, labels.c.label == label))


def labels_of(db: Connection, name: str, version: int) -> list[str]:
    """The labels on a version, sorted."""
    return sorted(db.scalars(select(labels.c.label).where(labels.c.name == name, labels.c.version == version)))


def label_added(db: Connection, name: str, version: int) -> None:
    """Label a version that was just added: `current` when it is the only one, else `candidate`."""
    count = db.scalar(select(func.count()).select_from(versions).where(versions.c.name == name))
    _put(db, name, CURRENT if count == 1 else CANDIDATE, version, "add")


def move(db: Connection, to: Version, label: str, expected: int | None) -> dict[str, Any]:
    """Put a label on a version. Raises WorkFailed when it is not on `expected` any more, NotFound for no version."""
    before = where(db, to.name, label)
    if expected != ANYWHERE and before != expected:
        raise WorkFailed(
            f"{to.name}@{label} moved from {expected or 'none'} to {before or 'none'} while the gate ran: run it again."
        )
    own = (versions.c.name == to.name, versions.c.version == to.version)
    if db.scalar(select(versions.c.version).where(*own)) is None:
        raise NotFound(f"{to} is not there any more: another process removed it.")
    if before != to.version:
        _put(db, to.name, label, to.version, "promote")
    return {
        "name": to.name, "version": to.version, "label": label, "before": before, "changed": before != to.version,
    }  # fmt: skip


def roll_back(db: Connection, name: str, label: str) -> dict[str, Any]:
    """Undo the last move of a label that is not undone; see Registry.rollback."""
    own = select(moves.c.seq, moves.c.before).where(
        moves.c.name == name, moves.c.label == label, moves.c.undone.is_(False)
    )
    at, skipped = where(db, name, label), []
    for seq, before in db.execute(own.order_by(moves.c.seq.desc())).all():
        db.execute(update(moves).where(moves.c.seq == seq).values(undone=True))
        if before is None or before == at:
            continue
        there = (versions.c.name == name, versions.c.version == before)
        if db.scalar(select(versions.c.version).where(*there)) is None:
            skipped.append(before)
            continue
        _put(db, name, label, before, "rollback")
        return {"name": name, "label": label, "version": before, "before": at, "skipped": skipped}
    gone = f" (version {', '.join(map(str, skipped))} was removed)" if skipped else ""
    raise RegistryError(f"{name}@{label} was on no earlier version{gone}: nothing to go back to.")


def take_off(db: Connection, name: str, label: str) -> dict[str, Any]:
    """Remove a label from its version. Raises NotFound when `name` has it not."""
    before = where(db, name, label)
    if before is None:
        raise NotFound(f"{name} has no label {label!r}.")
    db.execute(delete(labels).where(labels.c.name == name, labels.c.label == label))
    _note(db, name, label, None, before, "take off")
    return {"name": name, "label": label, "before": before}


def record_gate(db: Connection, found: Version, label: str, against: int | None, told: Measured) -> None:
    """Keep what a gate measured with the version."""
    facts = {"name": found.name, "version": found.version, "label": label, "against": against, "at": now()}
    db.execute(insert(gates).values(**facts, **asdict(told)))


def last_gate(db: Connection, name: str, label: str) -> dict[str, Any] | None:
    """The newest gate that a version of `name` met on its way to `label`, as it was kept; None: there was none."""
    own = select(gates).where(gates.c.name == name, gates.c.label == label)
    row = db.execute(own.order_by(gates.c.seq.desc()).limit(1)).first()
    return None if row is None else dict(row._mapping)


def _put(db: Connection, name: str, label: str, version: int, action: str) -> None:
    before = where(db, name, label)
    if before is None:
        db.execute(insert(labels).values(name=name, label=label, version=version))
    else:
        own = (labels.c.name == name, labels.c.label == label)
        db.execute(update(labels).where(*own).values(version=version))
    _note(db, name, label, version, before, action)


def _note(db: Connection, name: str, label: str, version: int | None, before: int | None, action: str) -> None:
    row = {"name": name, "label": label, "version": version, "before": before, "action": action, "at": now()}
    db.execute(insert(moves).values(**row, undone=action == "rollback"))
