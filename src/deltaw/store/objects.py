"""Adapter folders by content: ROOT/objects/ab/abcd.../ with a manifest of every file's SHA-256.

The address is `Adapter.id`. The manifest finds a changed byte in any file, the index holds the manifest's own hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.core.misfits import not_finite, some
from deltaw.errors import AdapterError
from deltaw.store.files import space_explained, sync_file
from deltaw.store.peft import FILES, OURS, adapter_folder, read_adapter, write_adapter

MANIFEST = "deltaw-manifest.json"
HEX = frozenset("0123456789abcdef")


def object_folder(root: Path, adapter_id: str) -> Path:
    """Where the adapter of this id lies. Raises AdapterError when it is no id (64 hex digits)."""
    if len(adapter_id) != 64 or not set(adapter_id) <= HEX:
        raise AdapterError(f"{adapter_id!r} is no adapter's id (64 hex digits).")
    return root / "objects" / adapter_id[:2] / adapter_id


def object_ids(root: Path) -> set[str]:
    """The ids of all folders there are."""
    return {p.name for p in (root / "objects").glob("??/*") if len(p.name) == 64 and set(p.name) <= HEX}


def bring(source: Adapter | str | Path, folder: Path) -> Adapter:
    """Write an adapter, or copy a saved one's files, into `folder` (a new one) with a manifest; synced to the disk.

    What PEFT saved is written again as deltaw does, so that it says its id. Files that are no adapter's stay behind.
    Returns what was read back from `folder`. Raises AdapterError, NotFound, WorkFailed (no space).
    """
    with space_explained("an adapter", folder.parent):
        if isinstance(source, Adapter):
            write_adapter(source, folder)
        else:
            where = adapter_folder(source)
            found = read_adapter(where)  # what is wrong is said of the reader's folder, not of a copy
            if (where / OURS).is_file():
                folder.mkdir()
            else:
                write_adapter(found, folder)
            for path in where.iterdir():
                if path.name in FILES and path.is_file() and not (folder / path.name).exists():
                    shutil.copyfile(path, folder / path.name)
        adapter = read_adapter(folder)
        if bad := not_finite(adapter.tensors()):
            raise AdapterError(
                f"The adapter holds NaN or Inf in {some(bad)}: it is not kept. Take an earlier checkpoint."
            )
        write_manifest(folder, adapter.id)
        for path in folder.iterdir():
            path.chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)  # no tool of ours writes here again
            sync_file(path)
        sync_file(folder)
    return adapter


def write_manifest(folder: Path, adapter_id: str) -> None:
    """Write the manifest of what is in `folder`."""
    files = {p.name: {"sha256": file_hash(p), "bytes": p.stat().st_size} for p in sorted(folder.iterdir())}
    text = json.dumps({"format": 1, "id": adapter_id, "files": files}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(text: str | bytes, where: str) -> dict[str, Any]:
    """A manifest's content: {"id", "files": {name: {"sha256", "bytes"}}}. Raises AdapterError for anything else.

    Only an adapter's own file names pass, so no name can lead out of a folder.
    """
    try:
        found = json.loads(text)
        files = {str(name): (str(f["sha256"]), int(f["bytes"])) for name, f in found["files"].items()}
        is_ours = found["format"] == 1 and len(found["id"]) == 64 and set(found["id"]) <= HEX
    except (ValueError, KeyError, TypeError, AttributeError):
        raise AdapterError(f"{where} is no manifest that deltaw wrote.") from None
    if not is_ours or not files or not set(files) <= FILES:
        odd = sorted(set(files) - FILES)
        raise AdapterError(f"{where} is no manifest of an adapter{f': it lists {odd[0]!r}' if odd else ''}.")
    return {"id": found["id"], "files": {n: {"sha256": s, "bytes": b} for n, (s, b) in files.items()}}


def damage(folder: Path, adapter_id: str, manifest_hash: str | None) -> str | None:
    """What is wrong with an adapter's folder, as a clause; None when every byte is as it was stored.

    manifest_hash  SHA-256 of the manifest's file as the index has it; None: take the manifest as it is
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        return "its folder is gone"
    if not path.is_file():
        return f"{MANIFEST} is gone"
    try:
        if manifest_hash is not None and file_hash(path) != manifest_hash:
            return f"{MANIFEST} was changed"
        manifest = read_manifest(path.read_bytes(), MANIFEST)
        if manifest["id"] != adapter_id:
            return f"{MANIFEST} is another adapter's ({manifest['id'][:12]})"
        there = {p.name for p in folder.iterdir()} - {MANIFEST}
        if odd := sorted(there ^ set(manifest["files"])):
            return f"{odd[0]} {'was added' if odd[0] in there else 'is gone'}"
        for name, told in manifest["files"].items():
            if (folder / name).is_symlink() or not (folder / name).is_file():
                return f"{name} is no plain file"
            if file_hash(folder / name) != told["sha256"]:
                return f"{name} was changed"
    except (AdapterError, OSError) as problem:
        return f"it cannot be read ({problem})"
    return None


def put(made: Path, target: Path, trash: Path) -> None:
    """Move a finished folder to its address; what lies there (a damaged copy) goes to `trash` first."""
    with space_explained("an adapter", target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            os.rename(target, trash)
        os.rename(made, target)
        sync_file(target.parent)
        sync_file(target.parent.parent)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
