"""Files of rows that the workbench keeps: given through the page, read by the library's own reader."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from deltaw.data.source import read_rows
from deltaw.errors import BadInput, DataError
from deltaw.store.files import whole_file

MOST_BYTES = 64_000_000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}\.jsonl")
_SHOWN = 3


def kept_rows(data: Path) -> list[dict[str, Any]]:
    """The files of rows in a folder: [{"name", "path", "rows", "bytes"}]; `rows` are lines that are not blank."""
    found = sorted(p for p in data.glob("*.jsonl") if p.is_file() and _NAME.fullmatch(p.name))
    return [_about(p) for p in found]


def keep_rows(data: Path, name: str, text: str) -> dict[str, Any]:
    """Write a file of rows, whole or not at all; what `kept_rows` says of it, and its first rows as `shown`.

    Raises BadInput for a name that is no plain file's or is taken, DataError with the line for rows that cannot be
    read.
    """
    if not _NAME.fullmatch(name):
        raise BadInput(
            f"a file of rows cannot be called {name!r}: use letters, digits, '.', '_' and '-', and end in .jsonl."
        )
    path = data / name
    given = text.encode("utf-8", "surrogatepass")
    if path.exists():
        if path.read_bytes() != given:
            raise BadInput(f"there is another {name!r} already, and a run may use it: give this one another name.")
    else:
        with whole_file(path) as aside:
            aside.write_bytes(given)
            try:
                read_rows(aside)
            except DataError as problem:
                raise DataError(str(problem).replace(str(aside), name)) from None
    lines = [line for line in text.split("\n") if line.strip()]  # as the reader: a text may hold other line ends
    return _about(path) | {"shown": [json.loads(line.lstrip("\ufeff")) for line in lines[:_SHOWN]]}


def _about(path: Path) -> dict[str, Any]:
    now = path.stat()
    count = _lines(path, now.st_size, now.st_mtime_ns)
    return {"name": path.name, "path": str(path), "rows": count, "bytes": now.st_size}


@lru_cache(maxsize=256)
def _lines(path: Path, size: int, changed: int) -> int:
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)
