"""Where the workbench keeps its things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Desk:
    """Folders of a workbench; they are made when something is first written.

    runs      RUNS/NAME is the folder of a run
    registry  the folder of the registry, or where it is otherwise
    data      files of rows that were given through the page
    index     URL of the registry's index; None: SQLite in its folder
    """

    runs: Path
    registry: str
    data: Path
    index: str | None = None


def desk_in(runs: Path, registry: str | None = None, index: str | None = None) -> Desk:
    """The desk of a folder of runs: data lie in RUNS/data, and so does the registry in RUNS/registry, unless given."""
    return Desk(runs, registry or str(runs / "registry"), runs / "data", index)
