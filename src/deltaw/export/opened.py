"""What every export begins with: the base found and compared, the adapter fitted to it, the place to write free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from deltaw.core.adapter import Adapter
from deltaw.core.fingerprint import BaseFingerprint, fingerprint_folder
from deltaw.errors import AdapterError, BaseError, RunError
from deltaw.merge.checkpoint import Checkpoint
from deltaw.merge.source import Source
from deltaw.methods.lora import Lora
from deltaw.model.identity import compare
from deltaw.model.load import folder_format, resolve_base
from deltaw.store.peft import read_adapter

Say = Callable[[str], object]


@dataclass(frozen=True)
class Opened:
    """A base and perhaps an adapter, read as far as an export needs. No weight is in memory yet."""

    folder: Path
    fingerprint: BaseFingerprint
    source: Source
    adapter: Adapter | None


@contextmanager
def opened(
    base: str | Path, adapter: str | Path | Adapter | None, allow_other_base: bool, say: Say | None
) -> Iterator[Opened]:
    """A dense base with the adapter that belongs to it.

    Raises BaseError (not found, or its files are quantised), AdapterError, BaseMismatch.
    """
    if adapter is not None and not isinstance(adapter, Adapter):
        adapter = read_adapter(Path(adapter))
    folder = resolve_base(base, say=say)
    saved = folder_format(folder)
    if saved is not None:
        raise BaseError(
            f"{folder} holds {saved.name} weights, and an export needs dense ones.\n  Give the 16- or 32-bit model "
            "that it was made from, or write it dense first: deltaw merge --into dequantised."
        )
    fingerprint = fingerprint_folder(folder)
    if adapter is not None:
        compare(adapter.fingerprint, fingerprint, allow_other_base)
    with Checkpoint(folder) as checkpoint, torch.no_grad():
        source = Source(folder, checkpoint, adapter or Adapter(Lora(), {}), fingerprint.dtype)
        yield Opened(folder, fingerprint, source, adapter)


def refuse_taken(out: Path) -> None:
    """Raise RunError when there is something at `out`: an export overwrites nothing."""
    if out.exists() or out.is_symlink():
        raise RunError(f"{out} is there already.\n  Choose another --out, or remove it.")


def refuse(problems: Sequence[str], what: str, instead: str, kind: type[AdapterError] | type[BaseError]) -> None:
    """Raise `kind` with every one of `problems` on a line of its own, unless there are none."""
    if problems:
        raise kind(f"{what}:\n" + "".join(f"  - {p}\n" for p in problems) + f"  {instead} Nothing was written.")


def instead(adapter: Adapter, otherwise: str) -> str:
    """What to do with an adapter that a format cannot hold: `otherwise`, where weights can hold it."""
    return otherwise if adapter.spec.mergeable else "Nor can weights hold it: serve it with deltaw."
