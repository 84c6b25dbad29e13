"""`--registry`, and adapters by reference: what every command that takes an adapter uses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.errors import NotFound, RegistryError

if TYPE_CHECKING:
    from deltaw.store.registry import Registry

RegistryOption = Annotated[
    Path | None,
    typer.Option("--registry", help="Folder of a registry of adapters (DELTAW_REGISTRY by default)."),
]

_default: dict[str, str | None] = {"registry": None, "index": None}


def set_registry(folder: str | None, index: str | None) -> None:
    """The registry for commands without --registry, and the URL of its index (None: SQLite in its folder)."""
    _default.update(registry=folder or None, index=index or None)


def registry_default() -> str | None:
    """The registry that DELTAW_REGISTRY names, if it is set."""
    return _default["registry"]


def index_default() -> str | None:
    """The URL of a registry's index that DELTAW_INDEX gives, if it is set."""
    return _default["index"]


def open_registry(folder: Path | None, *, create: bool = False) -> Registry:
    """The registry in `folder`, or the one that DELTAW_REGISTRY names. Raises RegistryError when there is neither."""
    from deltaw.store.registry import Registry

    where = folder or _default["registry"]
    if where is None:
        raise RegistryError("Which registry? Give --registry DIR, or set DELTAW_REGISTRY.")
    return Registry(where, index=_default["index"], create=create)


def adapter_path(given: str | Path, registry: Path | None = None) -> Path:
    """The folder of an adapter: `given` itself where it exists, else what it refers to in the registry, checked.

    Without a registry `given` is a path, whatever it looks like. Raises NotFound, RegistryError, AdapterError.
    """
    path = Path(given).expanduser()
    if path.exists() or (registry is None and _default["registry"] is None):
        return path
    if "/" in str(given) or "\\" in str(given):
        raise NotFound(f"No adapter at {path}: there is no such folder (and no reference has a slash).")
    try:
        return open_registry(registry).folder(str(given))
    except (NotFound, RegistryError) as problem:
        raise type(problem)(f"No folder {path}, and not in the registry either: {problem}") from None
