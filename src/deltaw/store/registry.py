"""A registry: adapters by content, under names with versions and labels.

    ROOT/registry.json   which index belongs here
    ROOT/index.sqlite    names, versions, labels, history (or a database by URL)
    ROOT/objects/        the adapters' folders, by id
    ROOT/aside/ leases/  what is being written, and who uses what

Files are whole before the index names them, and the index forgets before files go: a process that is killed leaves
at most files that `gc` clears.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, select

from deltaw.errors import AdapterError, NotFound, RegistryError
from deltaw.store import catalog, labels
from deltaw.store.catalog import Version
from deltaw.store.files import space_explained, write_text
from deltaw.store.gate import Gate
from deltaw.store.index import Index, adapters, bases, sqlite_url
from deltaw.store.leases import aside, in_use, own_lease, registry_lock
from deltaw.store.references import CURRENT, check_label, check_name, parse_reference

if TYPE_CHECKING:
    from deltaw.core.adapter import Adapter
    from deltaw.core.fingerprint import BaseFingerprint

MARK = "registry.json"
_SELF = {".lock", "leases", "aside", "objects", *(f"index.sqlite{s}" for s in ("", "-wal", "-shm", "-journal"))}


class Registry:
    """A registry of adapters in a folder.

    Any number of threads and processes may use one at once. What a call returned is kept, also when the process is
    killed the moment after.
    """

    def __init__(self, root: str | Path, *, index: str | None = None, create: bool = False) -> None:
        """Open the registry in the folder `root`.

        index   SQLAlchemy's URL of the database that holds the index; None: SQLite in `root`
        create  make one where `root` is absent or empty

        Raises NotFound (no registry there), RegistryError (something else is there, another or a lost index).
        """
        self.root = Path(root).expanduser().absolute()
        self.index = Index(index or sqlite_url(self.root))
        if not (self.root / MARK).is_file():
            if not create:
                raise NotFound(f"No registry at {self.root}. `deltaw adapters add` makes one; or name another folder.")
            self._create(index is not None)
        self._check(index is not None)

    def _create(self, is_elsewhere: bool) -> None:
        with space_explained("a registry", self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        left = f".{MARK}."  # what a killed process was writing
        if other := sorted(p.name for p in self.root.iterdir() if p.name not in _SELF and not p.name.startswith(left)):
            raise RegistryError(f"{self.root} holds something that is no registry ({other[0]}). Choose another folder.")
        with registry_lock(self.root):
            if (self.root / MARK).is_file():
                return  # another process was faster
            token = self.index.create(uuid.uuid4().hex)
            self._refuse_anothers()
            mark = {"format": 1, "token": token, "index": "elsewhere" if is_elsewhere else "sqlite"}
            write_text(self.root / MARK, json.dumps(mark) + "\n")
            for path in self.root.glob(f"{left}*"):
                path.unlink()

    def _refuse_anothers(self) -> None:
        """Raise RegistryError when the index holds adapters and this folder none of them: it is another registry's."""
        from deltaw.store.objects import object_ids

        with self.index.reading() as db:
            held = set(db.scalars(select(adapters.c.id)))
        if held and not held & object_ids(self.root):
            raise RegistryError(
                f"The index {self.index.shown} holds {len(held)} adapters of another registry, and {self.root} none of "
                "them: give that registry's folder, or another database."
            )

    def _check(self, is_elsewhere: bool) -> None:
        """Raise RegistryError unless the index is the one that belongs here: with another, gc would clear the store."""
        try:
            mark = json.loads((self.root / MARK).read_text(encoding="utf-8"))
            token, kind = mark["token"], mark["index"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise RegistryError(f"{self.root / MARK} cannot be read: {problem}. Restore it from a copy.") from None
        if (kind == "elsewhere") != is_elsewhere:
            has = "a database elsewhere: give its URL (index=, DELTAW_INDEX)" if kind == "elsewhere" else "its folder"
            raise RegistryError(f"The registry {self.root} keeps its index in {has}.")
        if not is_elsewhere and not (self.root / "index.sqlite").is_file():
            raise RegistryError(f"{self.root / 'index.sqlite'} is gone: restore it from a copy. objects/ is untouched.")
        if self.index.token() != token:
            raise RegistryError(f"The index {self.index.shown} is not the one of the registry {self.root}.")

    # Looking ------------------------------------------------------------------------------------------

    def resolve(self, ref: str) -> Version:
        """The version that a reference (`name`, `name@3`, `name@label`, 8 or more hex digits of an id) means.

        Raises NotFound (near names are listed), RegistryError (no reference, or an id that several begin with).
        """
        parsed = parse_reference(ref)
        with self.index.reading() as db:
            return catalog.find(db, parsed)

    def folder(self, ref: str) -> Path:
        """The adapter's folder, every byte checked; this process may use it until it ends, gc leaves it alone.

        Every consumer gets an adapter through here. Raises AdapterError when a byte is not as it was stored,
        NotFound and RegistryError as `resolve`.
        """
        from deltaw.store.objects import damage, object_folder

        with registry_lock(self.root):  # gc cannot come between the look-up and the lease
            found = self.resolve(ref)
            own_lease(self.root).hold(found.id)
        path = object_folder(self.root, found.id)
        if why := damage(path, found.id, found.manifest):
            raise AdapterError(
                f"{ref} ({found.id[:12]}) is damaged in the registry {self.root}: {why}; add or pull a good copy to "
                "mend it."
            )
        return path

    def listing(self, base: BaseFingerprint | None = None) -> list[dict[str, Any]]:
        """Every name with its labels, versions and current adapter, by name.

        base  says for each current adapter whether it fits this base: "fits" is "yes", "no" (re-adapt it) or
              "unknown" (it does not say its base), "differs" the fields that differ
        """
        with self.index.reading() as db:
            return catalog.listing(db, base)

    def show(self, ref: str) -> dict[str, Any]:
        """Everything about a version (`name@3`, an id) or, for a bare name, about it and all its versions."""
        parsed = parse_reference(ref)
        with self.index.reading() as db:
            if parsed.label == CURRENT and "@" not in ref:
                return catalog.show_name(db, parsed.name)
            return catalog.show_version(db, catalog.find(db, parsed))

    def last_gate(self, name: str, label: str = CURRENT) -> Gate | None:
        """The gate that was last asked before a promotion of `name` to `label`; None: there was none."""
        check_name(name)
        check_label(label)
        with self.index.reading() as db:
            met = labels.last_gate(db, name, label)
        return None if met is None else Gate(met["command"], met["min_gain"], met["min_value"])

    # Changing -----------------------------------------------------------------------------------------

    def add(self, name: str, adapter: Adapter | str | Path) -> dict[str, Any]:
        """Keep an adapter (or the folder of one, or of a run) as the next version of `name`.

        The first version of a name becomes `current`, later ones `candidate`. An adapter that `name` holds already
        makes no new version; a damaged copy in the store is replaced by the good one.

        Returns {"name", "version", "id", "labels", "new"}. Raises AdapterError, NotFound, RegistryError, WorkFailed.
        """
        from deltaw.store.objects import MANIFEST, bring, damage, file_hash, object_folder, put, size_of

        check_name(name)
        with aside(self.root) as folder:
            made = bring(adapter, folder / "adapter")
            target = object_folder(self.root, made.id)
            with registry_lock(self.root):
                with self.index.reading() as db:
                    known = db.scalar(select(adapters.c.manifest).where(adapters.c.id == made.id))
                if damage(target, made.id, known) is not None:
                    put(folder / "adapter", target, folder / "damaged")
                manifest = file_hash(target / MANIFEST)
                with self.index.writing() as db:
                    catalog.keep(db, made, manifest, size_of(target))
                    version, is_new = catalog.add_version(db, name, made)
                    if is_new:
                        labels.label_added(db, name, version)
                    on_it = labels.labels_of(db, name, version)
        return {"name": name, "version": version, "id": made.id, "labels": on_it, "new": is_new}

    def promote(self, ref: str, label: str = CURRENT, gate: Gate | None = None) -> dict[str, Any]:
        """Put `label` on a version: one atomic flip.

        gate  a command that measures the version and the one the label is on now, and what must hold. Its record
              stays with the version whatever it says

        Returns {"name", "version", "label", "before", "changed", "gate"}. Raises WorkFailed when the gate is not
        passed, its command fails, or the label moved meanwhile; nothing has changed then.
        """
        check_label(label)
        found = self._one(ref)
        against = None
        if gate is not None:
            with self.index.reading() as db:
                against = labels.where(db, found.name, label)
            before = None if against is None else self.folder(f"{found.name}@{against}")
            told = gate.measure(self.folder(str(found)), before)
            with self.index.writing() as db:
                labels.record_gate(db, found, label, against, told)
            gate.demand(told, str(found), None if against is None else f"{found.name}@{against}")
        with self.index.writing() as db:
            moved = labels.move(db, found, label, against if gate is not None else labels.ANYWHERE)
        return {**moved, "gate": None if gate is None else {**asdict(told), "against": against}}

    def rollback(self, name: str, label: str = CURRENT) -> dict[str, Any]:
        """Put `label` back where it was before its last move; again and again, back through its history.

        Versions that were removed since are passed over. Returns {"name", "label", "version", "before", "skipped"}.
        Raises RegistryError when there is nothing before, NotFound for a name that is not there.
        """
        check_name(name)
        check_label(label)
        with self.index.writing() as db:
            catalog.require_name(db, name)
            return labels.roll_back(db, name, label)

    def unlabel(self, name: str, label: str) -> dict[str, Any]:
        """Take a label off; rollback puts it back. Raises NotFound when `name` has no such label."""
        check_name(name)
        check_label(label)
        with self.index.writing() as db:
            catalog.require_name(db, name)
            return labels.take_off(db, name, label)

    def remove(self, ref: str) -> dict[str, Any]:
        """Forget a version; its number is never given again, its files go with the next gc.

        Raises RegistryError, naming what refers to it, for a version with a label or one that others were made from.
        """
        found = self._one(ref)
        with self.index.writing() as db:
            catalog.remove(db, found)
        return {"name": found.name, "version": found.version, "id": found.id, "removed": True}

    def gc(self) -> dict[str, Any]:
        """Delete the files that no version refers to and no living process uses.

        Returns {"deleted": ids, "in_use": ids kept for a process, "bytes": freed, "left_aside": of killed processes}.
        """
        from deltaw.store.objects import object_folder, object_ids, size_of

        with aside(self.root) as trash:
            with registry_lock(self.root):
                used, left = in_use(self.root)
                with self.index.writing() as db:
                    wanted = catalog.wanted(db)
                    for adapter_id in set(db.scalars(select(adapters.c.id))) - wanted - used:
                        db.execute(delete(adapters).where(adapters.c.id == adapter_id))
                    told = select(adapters.c.base).where(adapters.c.base.is_not(None))
                    db.execute(delete(bases).where(bases.c.id.not_in(told)))
                there = object_ids(self.root) - wanted
                gone = sorted(there - used)
                freed = sum(size_of(object_folder(self.root, i)) for i in gone)
                for number, path in enumerate([*(object_folder(self.root, i) for i in gone), *left]):
                    os.rename(path, trash / str(number))
            shutil.rmtree(trash)
        return {"deleted": gone, "in_use": sorted(there & used), "bytes": freed, "left_aside": len(left)}

    def verify(self) -> dict[str, Any]:
        """Check every byte that a version refers to, and the index: {"sound", "damaged", "problems", ...}."""
        from deltaw.store.audit import verify

        return verify(self)

    def diff(self, a: str, b: str) -> dict[str, Any]:
        """What differs between two adapters: settings, base, recipe, metrics, tensors."""
        from deltaw.store.compare import compare_adapters

        return compare_adapters(self, a, b)

    def push(self, ref: str, url: str) -> dict[str, Any]:
        """Copy an adapter to a folder, memory://, s3:// or hf://owner/repo; its manifest goes last."""
        from deltaw.store.remote import push

        return push(self, ref, url)

    def pull(self, name: str, url: str) -> dict[str, Any]:
        """Add what `push` wrote to `url` as the next version of `name`, after checking every hash."""
        from deltaw.store.remote import pull

        return pull(self, name, url)

    def _one(self, ref: str) -> Version:
        """The version that a reference names for a change: an id must belong to one version only."""
        parsed = parse_reference(ref)
        with self.index.reading() as db:
            found = catalog.find(db, parsed)
            if parsed.prefix is not None and len(held := catalog.holders(db, found.id)) > 1:
                raise RegistryError(f"{ref} is held as {', '.join(held)}: say which, as NAME@VERSION.")
        return found
