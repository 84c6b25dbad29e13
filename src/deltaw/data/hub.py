"""What JSON Lines is not: data sets that the optional `datasets` package reads."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltaw.errors import DataError

PREFIX = "hf:"
FORMATS = {".parquet": "parquet", ".csv": "csv", ".json": "json"}


def reads(source: str) -> bool:
    """Is this source read by `datasets`, and not as JSON Lines?"""
    return source.startswith(PREFIX) or Path(source).suffix.lower() in FORMATS


def read_dataset(source: str) -> Iterable[Mapping[str, Any]]:
    """The records of "hf:<dataset>[:split]" (split "train" if not named), or of a file of FORMATS.

    Raises DataError if `datasets` is not installed or cannot read the source.
    """
    datasets = _datasets(source)
    name, split = source, ""
    if source.startswith(PREFIX):
        name, _, split = source.removeprefix(PREFIX).partition(":")
    split = split or "train"
    kind = FORMATS.get(Path(name).suffix.lower())
    options = {"data_files": str(Path(name).expanduser())} if kind else {}
    try:
        records: Iterable[Mapping[str, Any]] = datasets.load_dataset(kind or name, split=split, **options)
    except Exception as error:  # whatever a reader of foreign files may raise
        raise DataError(
            f"the data set {source!r} cannot be read (split {split!r}): {type(error).__name__}: {error}\n"
            "  Check the name, the split and the network, or give a JSON Lines file instead."
        ) from error
    return records


def _datasets(source: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{source!r} is read by the `datasets` package, which is not installed ({error}).\n"
            "  Install it with: pip install 'deltaw[datasets]', or give a JSON Lines file (.jsonl)."
        ) from error
