"""What a desk holds, by the names that a page gives: runs with their adapters, and the registry."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deltaw.errors import NotFound, near
from deltaw.lab.desk import Desk
from deltaw.store.describe import is_adapter, is_run

if TYPE_CHECKING:
    from deltaw.store.registry import Registry


def find_run(desk: Desk, name: str) -> Path:
    """The folder of a run. A name is that of a folder in `desk.runs` and nothing else. Raises NotFound."""
    plain = Path(name).name == name and "\0" not in name and len(name) < 256
    if not plain or not is_run(desk.runs / name):
        raise NotFound(f"No run is called {name[:80]!r} in {desk.runs}.{near(name[:80], run_names(desk))}")
    return desk.runs / name


def run_names(desk: Desk, *, with_adapter: bool = False) -> list[str]:
    """The runs of a desk by name; with_adapter: only those that have left one."""
    if not desk.runs.is_dir():
        return []
    return sorted(p.name for p in desk.runs.iterdir() if is_run(p) and (not with_adapter or is_adapter(p)))


def open_registry(desk: Desk, *, create: bool = False) -> Registry:
    """The desk's registry. Raises NotFound where there is none yet (unless `create`), RegistryError."""
    from deltaw.store.registry import Registry

    return Registry(desk.registry, index=desk.index, create=create)


def has_registry(desk: Desk) -> bool:
    """Whether there is a registry that can be opened or that says why it cannot."""
    from deltaw.store.registry import MARK

    return (Path(desk.registry).expanduser() / MARK).is_file()
