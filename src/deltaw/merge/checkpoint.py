"""A checkpoint folder as tensors: read one at a time, written one shard at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from deltaw.core.checkpoint_files import checkpoint_files, read_header
from deltaw.formats.dense import DenseWeight
from deltaw.store.files import write_text

SHARD_BYTES = 2_000_000_000
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies and how: `dtype` as safetensors names it ("BF16")."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


class Checkpoint:
    """The safetensors files of a folder. Every file's header is checked before anything is read.

    entries  tensors by their name in the files, in file order
    where    the file of each stored tensor

    Raises BaseError that names a truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.entries = {
            key: Entry(file, dtype, shape, last - first)
            for file in checkpoint_files(folder)
            for key, (dtype, shape, first, last) in read_header(file).items()
        }
        self.where = {key: entry.file for key, entry in self.entries.items()}
        self._files: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def read(self, key: str) -> Tensor:
        """One tensor by its key in `entries`."""
        return self.stored(key)

    def stored(self, key: str) -> Tensor:
        """One tensor of the files, as it is stored."""
        file = self.where[key]
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(file, "pt"))
        tensor: Tensor = self._files[file].get_tensor(key)
        return tensor

    def key_of(self, name: str, shape: tuple[int, ...], prefix: str) -> str | None:
        """What the files call the network's tensor `name`, or None: the same, without or with the prefix."""
        dotted = prefix + "."
        for key in (name, name.removeprefix(dotted), dotted + name):
            if key in self.entries and self.entries[key].shape == shape:
                return key
        return None


class StoredWeight:
    """A Weight (core/weight.py) whose matrix stays on the disk and is read each time it is asked for."""

    def __init__(self, shape: tuple[int, ...], transposed: bool, read: Callable[[], Tensor]) -> None:
        self.out_features, self.in_features = shape[::-1] if transposed else shape
        self.dtype = torch.float32
        self._read, self._transposed = read, transposed

    def _now(self, dtype: torch.dtype | None = None) -> DenseWeight:
        found = self._read()
        return DenseWeight(found if dtype is None else found.to(dtype), self._transposed)

    def dense(self, dtype: torch.dtype = torch.float32, room: Callable[[], Tensor] | None = None) -> Tensor:
        """W as [out, in] of `dtype`."""
        return self._now().dense(dtype, room)

    def parts(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Rows of W as [n, in] of `dtype`."""
        return self._now().parts(dtype)

    def mul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias."""
        return self._now(x.dtype).mul(x, bias)

    def mul_t(self, g: Tensor) -> Tensor:
        """g W."""
        return self._now(g.dtype).mul_t(g)

    def columns(self, ids: Tensor) -> Tensor:
        """Columns of W named by `ids`."""
        return self._now().columns(ids)

    def native(self, dtype: torch.dtype) -> None:
        """Nowhere: compiled products read memory."""

    def row_squares(self) -> Tensor:
        """The sum of squares of each row of W: [out]."""
        return self._now().row_squares()

    def like(self, dense: Tensor) -> DenseWeight:
        """A dense weight in memory that holds `dense`."""
        return self._now().like(dense)

    def nbytes(self) -> int:
        """Nothing of it is in memory."""
        return 0


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written: its name and size are known before its value."""

    key: str
    size_bytes: int


def write_shards(folder: Path, planned: list[Planned], values: Iterable[tuple[str, Tensor]], shard_bytes: int) -> int:
    """Write tensors as model.safetensors, or as shards of at most `shard_bytes` and an index.

    planned  names and sizes, in the order in which `values` yields them
    returns  bytes of the files; at most one shard is in memory
    """
    groups = _grouped(planned, shard_bytes)
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    supply: Iterator[tuple[str, Tensor]] = iter(values)
    where: dict[str, str] = {}
    n_bytes = 0
    for name, group in zip(names, groups, strict=True):
        shard = dict(next(supply) for _ in group)
        save_file(shard, folder / name, metadata={"format": "pt"})
        n_bytes += (folder / name).stat().st_size
        where |= dict.fromkeys(shard, name)
    if len(groups) > 1:
        total = sum(p.size_bytes for p in planned)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    return n_bytes


def _grouped(planned: list[Planned], shard_bytes: int) -> list[list[Planned]]:
    groups: list[list[Planned]] = [[]]
    filled = 0
    for item in planned:
        if groups[-1] and filled + item.size_bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += item.size_bytes
    return groups
