"""Where optimizer states lie: in memory, or in pages in a file of which a part stays in memory."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from deltaw.errors import RecipeError, WorkFailed
from deltaw.store.files import space_explained
from deltaw.train.optim.pages import Kind, Page, Span, aligned, page_bytes, spans

States = dict[str, Tensor]
"""Flat states by name, of a parameter or of a part of one."""


class Store(Protocol):
    """Keeps the states of parameters that have numbers, and lends them out page by page."""

    resident_bytes: int
    """Bytes of states and buffers in memory."""

    def open(self, page: int, slot: int) -> list[States]:
        """The states of each of the page's segments, to be changed in place; one page a slot at a time."""

    def close(self, page: int, slot: int) -> int:
        """Take the page back: bytes moved for it."""

    def states(self) -> list[States]:
        """The whole states of each parameter; what changes them later may or may not show in them."""

    def load(self, states: Sequence[States]) -> None:
        """Take over whole states, given for each parameter."""


class Resident:
    """Every state in memory, beside its parameter."""

    def __init__(self, pages: Sequence[Page], kinds: Sequence[tuple[Kind, ...]], devices: Sequence[torch.device]):
        self._pages, self._kinds = pages, kinds
        self._states = [
            {k.name: torch.zeros(k.size, dtype=k.dtype, device=device) for k in of_one}
            for of_one, device in zip(kinds, devices, strict=True)
        ]
        self.resident_bytes = sum(kind.n_bytes for of_one in kinds for kind in of_one)

    def open(self, page: int, slot: int) -> list[States]:
        return [
            {k.name: self._states[i][k.name][slice(*k.part(start, stop))] for k in self._kinds[i]}
            for i, start, stop in self._pages[page]
        ]

    def close(self, page: int, slot: int) -> int:
        return 0

    def states(self) -> list[States]:
        return self._states

    def load(self, states: Sequence[States]) -> None:
        for mine, given in zip(self._states, states, strict=True):
            for name, tensor in given.items():
                mine[name].copy_(tensor.view(-1))


class Paged:
    """States in a file without a name, except for the pages that always stay in memory.

    A page that does not stay is read into its slot's buffer and written back from there. Read and written, not
    mapped: pages of the file then never count as this process's memory, and no update waits in a page fault. The
    file holds every state whole, one after the other. A file without a name is gone with its process, however that
    ends.

    Raises WorkFailed when `folder` has no room for the states, before anything is trained.
    """

    def __init__(
        self,
        pages: Sequence[Page],
        kinds: Sequence[tuple[Kind, ...]],
        stay: Collection[int],
        n_slots: int,
        folder: Path,
    ) -> None:
        self._kinds = kinds
        self._begins: list[dict[str, int]] = []  # of each state in the file
        self._size = 0
        for of_one in kinds:
            self._begins.append({})
            for kind in of_one:
                self._begins[-1][kind.name] = self._size
                self._size += aligned(kind.n_bytes)
        self._spans = [spans(page, kinds) for page in pages]
        self._n_segments = [len(page) for page in pages]
        self._ahead = n_slots
        self._where = folder
        sizes = [page_bytes(of_page) for of_page in self._spans]
        self._buffers = torch.empty(n_slots, max(sizes), dtype=torch.uint8)
        memory = torch.zeros(sum(sizes[i] for i in stay), dtype=torch.uint8)
        ends = list(_running_sum([sizes[i] for i in sorted(stay)]))
        self._stay = {i: memory[end - sizes[i] : end] for i, end in zip(sorted(stay), ends, strict=True)}
        self.resident_bytes = self._buffers.numel() + memory.numel()
        self._fd = _nameless_file(folder, self._size)
        weakref.finalize(self, os.close, self._fd)

    def open(self, page: int, slot: int) -> list[States]:
        memory = self._memory(page, slot)
        if page not in self._stay:
            self._foretell(page)
            self._read(page, memory)
        found: list[States] = [{} for _ in range(self._n_segments[page])]
        for span in self._spans[page]:
            found[span.segment][span.kind.name] = memory[span.at : span.stop].view(span.kind.dtype)
        return found

    def close(self, page: int, slot: int) -> int:
        if page in self._stay:
            return 0
        self._write(page, self._memory(page, slot))
        return 2 * sum(span.stop - span.at for span in self._spans[page])

    def states(self) -> list[States]:
        """Views of the file, which are no memory of this process's own; valid until the next update."""
        with self._explained():
            for page, memory in self._stay.items():
                self._write(page, memory)
            mapped = mmap.mmap(self._fd, self._size)
        return [
            {k.name: torch.frombuffer(mapped, dtype=k.dtype, count=k.size, offset=begins[k.name]) for k in of_one}
            for of_one, begins in zip(self._kinds, self._begins, strict=True)
        ]

    def load(self, states: Sequence[States]) -> None:
        with self._explained():
            for begins, given in zip(self._begins, states, strict=True):
                for name, tensor in given.items():
                    _write_at(self._fd, tensor.contiguous().view(-1).view(torch.uint8), begins[name])
            for page, memory in self._stay.items():
                self._read(page, memory)

    def _memory(self, page: int, slot: int) -> Tensor:
        return self._stay[page] if page in self._stay else self._buffers[slot]

    def _place(self, span: Span) -> int:
        return self._begins[span.parameter][span.kind.name] + span.first * span.kind.dtype.itemsize

    def _read(self, page: int, memory: Tensor) -> None:
        with self._explained():
            for span in self._spans[page]:
                _read_at(self._fd, memory[span.at : span.stop], self._place(span))

    def _write(self, page: int, memory: Tensor) -> None:
        with self._explained():
            for span in self._spans[page]:
                _write_at(self._fd, memory[span.at : span.stop], self._place(span))

    def _foretell(self, page: int) -> None:
        """Let the system read what comes a few pages later, if it is not in its cache any more."""
        ahead = page + self._ahead
        if ahead < len(self._spans) and ahead not in self._stay and hasattr(os, "posix_fadvise"):
            for span in self._spans[ahead]:
                os.posix_fadvise(self._fd, self._place(span), span.stop - span.at, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        with space_explained("the optimizer's states", self._where):
            try:
                yield
            except OSError as error:
                raise WorkFailed(
                    f"The optimizer's states in {self._where} cannot be read or written: {error.strerror}. "
                    "The last checkpoint is kept; run again from it."
                ) from None


def _running_sum(sizes: Sequence[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


def _nameless_file(folder: Path, n_bytes: int) -> int:
    """A descriptor of a file of zeros whose space is taken already, and that goes with its last descriptor."""
    if not (hasattr(os, "preadv") and hasattr(os, "posix_fallocate")):
        raise RecipeError(
            "train.optimizer.paged needs preadv and posix_fallocate, which this system lacks. Remove it; "
            "train.optimizer.bits=8 needs a quarter of the memory too."
        )
    what = f"the optimizer's states ({n_bytes / 1e6:.1f} MB, train.optimizer.paged)"
    with space_explained(what, folder):
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
                return os.dup(file.fileno())
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise WorkFailed(f"Cannot write {what} to {folder}: files that large are not allowed there.") from None
            raise


def _read_at(fd: int, into: Tensor, at: int) -> None:
    left = into.numpy().data
    while left:
        if (n := os.preadv(fd, [left], at)) == 0:
            raise OSError(0, "the file ends early")
        left, at = left[n:], at + n


def _write_at(fd: int, data: Tensor, at: int) -> None:
    left = data.numpy().data
    while left:
        n = os.pwrite(fd, left, at)
        left, at = left[n:], at + n
