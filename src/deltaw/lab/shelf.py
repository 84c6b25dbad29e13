"""What a desk holds, by the names that a page gives: runs with their adapters, and the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.errors import NotFound
from deltaw.lab.desk import Desk
from deltaw.lab.run_files import RunFiles
from deltaw.store.describe import is_adapter, is_run

if TYPE_CHECKING:
    from deltaw.store.registry import Registry


def find_run(desk: Desk, name: str) -> Path:
    """The folder of a run that has begun. Raises NotFound."""
    folder = RunFiles(desk.runs).find(name)
    if not is_run(folder):
        raise NotFound(f"the run {name!r} has not begun yet: nothing lies in {folder}.")
    return folder


def run_names(desk: Desk, *, with_adapter: bool = False) -> list[str]:
    """The runs of a desk that have begun, by name; with_adapter: only those that have left one."""
    files = RunFiles(desk.runs)
    begun = [(n, files.folder(n)) for n in files.names()]
    return [n for n, path in begun if is_run(path) and (not with_adapter or is_adapter(path))]


def open_registry(desk: Desk, *, create: bool = False) -> Registry:
    """The desk's registry. Raises NotFound where there is none yet (unless `create`), RegistryError."""
    from deltaw.store.registry import Registry

    return Registry(desk.registry, index=desk.index, create=create)


def has_registry(desk: Desk) -> bool:
    """Whether there is a registry that can be opened or that says why it cannot."""
    from deltaw.store.registry import MARK

    return (Path(desk.registry).expanduser() / MARK).is_file()
