"""What the index knows of names and versions: found, listed, shown, added and removed in one transaction each."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Select, delete, func, insert, select, update

from deltaw.core.fingerprint import HARD, BaseFingerprint
from deltaw.errors import NotFound, RegistryError, near
from deltaw.store.index import adapters, bases, gates, labels, moves, names, now, parents, versions
from deltaw.store.references import CURRENT, Reference

if TYPE_CHECKING:
    from deltaw.core.adapter import Adapter


@dataclass(frozen=True)
class Version:
    """One version of a name: the adapter's id, and the hash of its manifest."""

    name: str
    version: int
    id: str
    manifest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


_FOUND = select(versions.c.name, versions.c.version, versions.c.adapter, adapters.c.manifest).join(
    adapters, versions.c.adapter == adapters.c.id
)


def find(db: Connection, ref: Reference) -> Version:
    """The version that `ref` means. Raises NotFound, RegistryError (an id that several adapters begin with)."""
    if ref.prefix is not None:
        return _by_id(db, ref.prefix)
    if ref.version is not None:
        row = db.execute(_FOUND.where(versions.c.name == ref.name, versions.c.version == ref.version)).first()
    else:
        at = (labels.c.name == versions.c.name) & (labels.c.version == versions.c.version)
        row = db.execute(_FOUND.join(labels, at).where(labels.c.name == ref.name, labels.c.label == ref.label)).first()
    if row is None:
        raise _absent(db, ref)
    return Version(*row)


def _by_id(db: Connection, prefix: str) -> Version:
    own = _FOUND.where(versions.c.adapter >= prefix, versions.c.adapter < prefix + "g")  # "g" follows the last digit
    rows = [Version(*row) for row in db.execute(own.order_by(versions.c.name, versions.c.version))]
    if not rows:
        raise NotFound(f"No version in this registry has an adapter whose id begins with {prefix}.")
    if len(ids := sorted({row.id for row in rows})) > 1:
        raise RegistryError(f"{len(ids)} adapters begin with {prefix}: give more digits ({', '.join(ids[:3])} ...).")
    return rows[0]


def _absent(db: Connection, ref: Reference) -> NotFound:
    require_name(db, ref.name)
    there = list(db.scalars(select(versions.c.version).where(versions.c.name == ref.name).order_by(versions.c.version)))
    on = sorted(db.scalars(select(labels.c.label).where(labels.c.name == ref.name)))
    what = f"version {ref.version}" if ref.version is not None else f"label {ref.label!r}"
    some = f"{there[0]} to {there[-1]}" if len(there) > 3 else ", ".join(map(str, there)) or "none"
    return NotFound(f"{ref.name} has no {what}: its versions are {some}, its labels {', '.join(on) or 'none'}.")


def require_name(db: Connection, name: str) -> None:
    """Raise NotFound, with the near names, unless some version of `name` is or was here."""
    if db.scalar(select(names.c.name).where(names.c.name == name)) is None:
        raise NotFound(f"No adapter is called {name!r} in this registry.{near(name, db.scalars(select(names.c.name)))}")


def holders(db: Connection, adapter_id: str) -> list[str]:
    """The versions that hold an adapter, as name@version."""
    own = select(versions.c.name, versions.c.version).where(versions.c.adapter == adapter_id)
    return [f"{n}@{v}" for n, v in db.execute(own.order_by(versions.c.name, versions.c.version))]


def children(db: Connection, adapter_id: str) -> list[str]:
    """The versions that were made from an adapter, as name@version."""
    own = select(parents.c.name, parents.c.version).where(parents.c.parent == adapter_id)
    return [f"{n}@{v}" for n, v in db.execute(own.order_by(parents.c.name, parents.c.version))]


def wanted(db: Connection) -> set[str]:
    """Ids that a version holds or names as a parent."""
    return {*db.scalars(select(versions.c.adapter)), *db.scalars(select(parents.c.parent))}


# Listing ---------------------------------------------------------------------------------------------


def listing(db: Connection, base: BaseFingerprint | None) -> list[dict[str, Any]]:
    """Every name that has versions, by name; see Registry.listing."""
    on: dict[str, dict[str, int]] = defaultdict(dict)
    for name, label, version in _tuples(db, select(labels.c.name, labels.c.label, labels.c.version)):
        on[name][label] = version
    told = db.execute(select(bases.c.id, bases.c.name, bases.c.fingerprint)).all()
    base_names = {None: None} | {i: name for i, name, _ in told}
    fits: dict[int | None, tuple[str, list[str]]] = {None: ("unknown", [])}
    if base is not None:
        fits |= {i: _fits(text, base) for i, _, text in told}
    own = (adapters.c.id, adapters.c.method, adapters.c.n_parameters, adapters.c.bytes, adapters.c.base)
    is_on = (labels.c.name == versions.c.name) & (labels.c.version == versions.c.version)
    current = (
        select(labels.c.name, versions.c.added, *own)
        .join(versions, is_on)
        .join(adapters, versions.c.adapter == adapters.c.id)
        .where(labels.c.label == CURRENT)
    )
    now_at = {row[0]: row for row in _tuples(db, current)}
    counts = select(versions.c.name, func.count(), func.max(versions.c.version)).group_by(versions.c.name)
    found = []
    for name, count, newest in sorted(_tuples(db, counts)):
        _, added, adapter_id, method, n_parameters, n_bytes, from_ = now_at.get(name) or (None,) * 7
        entry = {
            "name": name,
            "versions": count,
            "newest": newest,
            "labels": on.get(name, {}),
            "id": adapter_id,
            "method": method,
            "n_parameters": n_parameters,
            "bytes": n_bytes,
            "base": base_names[from_],
            "added": added,
        }
        if base is not None:
            entry["fits"], entry["differs"] = fits[from_] if adapter_id else (None, [])
        found.append(entry)
    return found


def _tuples(db: Connection, query: Select[Any]) -> list[tuple[Any, ...]]:
    """All rows as the driver gives them: a third of the time of SQLAlchemy's rows, which thousands of names feel."""
    result = db.execute(query)
    rows = list(result.cursor.fetchall())
    result.close()
    return rows


def _fits(text: str, base: BaseFingerprint) -> tuple[str, list[str]]:
    differs = list(BaseFingerprint.model_validate_json(text).differences(base))
    return "no" if set(differs) & set(HARD) else "yes", differs


def show_name(db: Connection, name: str) -> dict[str, Any]:
    """A name: its versions, labels and the moves of its labels."""
    require_name(db, name)
    own = (
        select(versions.c.version, versions.c.adapter, versions.c.added, versions.c.provenance, adapters.c.method)
        .join(adapters, versions.c.adapter == adapters.c.id)
        .where(versions.c.name == name)
    )
    on: dict[int, list[str]] = defaultdict(list)
    for label, version in db.execute(select(labels.c.label, labels.c.version).where(labels.c.name == name)):
        on[version].append(label)
    listed = [
        {
            "version": row.version,
            "labels": sorted(on[row.version]),
            "id": row.adapter,
            "method": row.method,
            "metrics": json.loads(row.provenance).get("metrics"),
            "added": row.added,
        }
        for row in db.execute(own.order_by(versions.c.version))
    ]
    columns = (moves.c.at, moves.c.action, moves.c.label, moves.c.before, moves.c.version)
    history = db.execute(select(*columns).where(moves.c.name == name).order_by(moves.c.seq))
    return {"kind": "name", "name": name, "versions": listed, "history": [dict(m._mapping) for m in history]}


def show_version(db: Connection, found: Version) -> dict[str, Any]:
    """A version: what it is, where it comes from, what was made from it, the gates it met."""
    own = (
        select(versions.c.added, versions.c.provenance, adapters, bases.c.fingerprint)
        .join(adapters, versions.c.adapter == adapters.c.id)
        .outerjoin(bases, adapters.c.base == bases.c.id)
        .where(versions.c.name == found.name, versions.c.version == found.version)
    )
    row = db.execute(own).one()
    note = json.loads(row.provenance)
    at = (labels.c.name == found.name, labels.c.version == found.version)
    met = db.execute(select(gates).where(gates.c.name == found.name, gates.c.version == found.version))
    return {
        "kind": "version",
        "name": found.name,
        "version": found.version,
        "labels": sorted(db.scalars(select(labels.c.label).where(*at))),
        "id": found.id,
        "method": row.method,
        "n_parameters": row.n_parameters,
        "bytes": row.bytes,
        "added": row.added,
        "date": note.get("date"),
        "base": None if row.fingerprint is None else json.loads(row.fingerprint),
        "parents": {parent: holders(db, parent) for parent in note.get("parents", [])},
        "children": children(db, found.id),
        "recipe": note.get("recipe"),
        "data_hash": note.get("data_hash"),
        "metrics": note.get("metrics"),
        "gates": [{k: v for k, v in g._mapping.items() if k not in ("seq", "name", "version")} for g in met],
    }


# Changes ------------------------------------------------------------------------------------------------


def keep(db: Connection, adapter: Adapter, manifest: str, n_bytes: int) -> None:
    """Note an adapter whose folder is in place."""
    print_ = adapter.fingerprint
    base = None
    if print_ is not None:
        text = print_.model_dump_json()
        base = hashlib.sha256(text.encode()).hexdigest()
        if db.scalar(select(bases.c.id).where(bases.c.id == base)) is None:
            db.execute(insert(bases).values(id=base, name=print_.short(), fingerprint=text))
    if db.scalar(select(adapters.c.id).where(adapters.c.id == adapter.id)) is not None:
        db.execute(update(adapters).where(adapters.c.id == adapter.id).values(manifest=manifest, bytes=n_bytes))
        return
    facts = {"method": adapter.spec.name, "n_parameters": adapter.n_parameters, "bytes": n_bytes, "base": base}
    db.execute(insert(adapters).values(id=adapter.id, manifest=manifest, **facts))


def add_version(db: Connection, name: str, adapter: Adapter) -> tuple[int, bool]:
    """(the version of `name` that holds the adapter, whether it is new)."""
    own = (versions.c.name == name, versions.c.adapter == adapter.id)
    if (there := db.scalar(select(func.min(versions.c.version)).where(*own))) is not None:
        return there, False
    last = db.scalar(select(names.c.last_version).where(names.c.name == name))
    if last is None:
        db.execute(insert(names).values(name=name, last_version=1))
    else:
        db.execute(update(names).where(names.c.name == name).values(last_version=last + 1))
    version = (last or 0) + 1
    note = json.dumps(adapter.provenance, default=str)
    db.execute(insert(versions).values(name=name, version=version, adapter=adapter.id, added=now(), provenance=note))
    from_ = adapter.provenance.get("parents", [])
    if not isinstance(from_, list) or not all(isinstance(p, str) and len(p) == 64 for p in from_):
        raise RegistryError(f"The adapter's provenance names {from_!r} as parents; a list of ids was expected.")
    for parent in sorted({*from_} - {adapter.id}):
        db.execute(insert(parents).values(name=name, version=version, parent=parent))
    return version, True


def remove(db: Connection, found: Version) -> None:
    """Forget a version. Raises RegistryError, naming what refers to it."""
    at = (labels.c.name == found.name, labels.c.version == found.version)
    if on := sorted(db.scalars(select(labels.c.label).where(*at))):
        raise RegistryError(
            f"{found} is {' and '.join(on)}: promote another version first, or take the label off "
            f"(deltaw adapters remove {found.name} --label {on[0]})."
        )
    made = [child for child in children(db, found.id) if child != str(found)]
    if made and holders(db, found.id) == [str(found)]:
        raise RegistryError(f"{found} is a parent of {', '.join(made[:5])}: remove {made[0]} first.")
    for table in (gates, parents, versions):
        gone = db.execute(delete(table).where(table.c.name == found.name, table.c.version == found.version))
    if gone.rowcount != 1:
        raise NotFound(f"{found} is not there any more: another process removed it.")
