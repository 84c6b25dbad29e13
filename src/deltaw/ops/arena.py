"""Memory of one training step: handed out in order, taken back in order, and the same pages step after step.

A general allocator returns large buffers to the system and pays page faults to have them again, and packs of changing
sizes leave holes in its heap. What a step keeps for its backward follows a stack, and so does what it needs for a
moment: two pointers are all it takes.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

ALIGN = 64
_LEAST = 64 << 20  # where the system grants no more than this, buffers come one by one
_APART = 2048  # bytes: rows so far apart, or a multiple of it, meet in a few places of each cache
_UNSEEN = torch._C._DisableTorchDispatch  # a planner that is told need not see, which takes seven times as long
_HUGE_PAGES = 14  # MADV_HUGEPAGE: fewer page faults, fewer misses of the TLB


class _Stack:
    """One region as large as the machine's memory is reserved; only pages that are touched cost anything."""

    def __init__(self) -> None:
        self.used = self.peak = self._size = 0
        self._region: torch.UntypedStorage | None = None

    def take(self, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None, apart: bool, told: bool) -> Tensor:
        dtype = like.dtype if dtype is None else dtype
        if like.device.type not in ("cpu", "meta"):
            return torch.empty(shape, dtype=dtype, device=like.device)
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        gap = ALIGN // dtype.itemsize if apart and strides[0] * dtype.itemsize % _APART == 0 else 0
        values = math.prod(shape) + gap * max(0, shape[0] - 1)
        strides[0] += gap
        end = self.used + -(-values * dtype.itemsize // ALIGN) * ALIGN
        if like.is_meta:  # counted, for plans
            self.used, self.peak = end, max(self.peak, end)
            with _UNSEEN() if told else nullcontext():
                return torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        if self._region is None:
            self._reserve()
        assert self._region is not None
        if end > self._size:
            return torch.empty_strided(shape, strides, dtype=dtype)
        at, self.used = self.used // dtype.itemsize, end
        self.peak = max(self.peak, end)
        # a tensor of its own on the region: views of one tensor would share its count of changes
        return torch.empty(0, dtype=dtype).set_(self._region, at, shape, strides)

    def _reserve(self) -> None:
        size = physical_bytes() // 4 * 3
        while size > _LEAST:
            try:
                held = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError:  # no such room
                size //= 2
                continue
            self._region, self._size = torch.frombuffer(held, dtype=torch.uint8).untyped_storage(), size
            return ask_for_huge_pages(self._region)
        self._region = torch.UntypedStorage(0)


class Arena:
    """Two stacks of buffers: what is kept until the backward, and what is borrowed for a moment.

    On other devices than the CPU, and beyond the region, PyTorch's own allocator gives them.

    told   called with each buffer and whether it is borrowed; a planner's ear
    lock   whoever takes memory holds it until the work that needs `scratch` is done, so that what threads keep lies in
           stretches of their own, and what one borrows is not another's
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.told: Callable[[Tensor, bool], None] | None = None
        self._kept, self._borrowed = _Stack(), _Stack()
        self._live = 0

    def keep(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None, apart: bool = False) -> Tensor:
        """An uninitialised tensor of `shape` in `dtype` (like's), valid as long as the lease it was taken under.

        apart   a matrix that products read or write: where rows take a multiple of 2 KB, 64 bytes lie between them
        """
        made = self._kept.take(shape, like, dtype, apart, self.told is not None)
        if self.told is not None:
            self.told(made, False)
        return made

    def borrow(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None, apart: bool = False) -> Tensor:
        """The same, valid until the end of the `scratch` block around it."""
        made = self._borrowed.take(shape, like, dtype, apart, self.told is not None)
        if self.told is not None:
            self.told(made, True)
        return made

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """What is borrowed inside is given back at the end."""
        before = self._borrowed.used
        try:
            yield
        finally:
            self._borrowed.used = before

    def lease(self) -> Lease:
        """What is kept from now until its `close` lives until its `end`; or until nobody holds the lease."""
        self._live += 1
        return Lease(self)

    def _end(self, start: int, stop: int) -> None:
        """Below what others keep there may be a hole for a while; nobody's memory is handed out twice."""
        self._live -= 1
        if not self._live:
            self._kept.used = 0
        elif self._kept.used == stop:
            self._kept.used = start

    @property
    def kept(self) -> int:
        """Bytes kept now."""
        return self._kept.used

    @property
    def borrowed(self) -> int:
        """Bytes borrowed now."""
        return self._borrowed.used

    @property
    def peak(self) -> int:
        """Bytes touched so far."""
        return self._kept.peak + self._borrowed.peak


class Lease:
    """A stretch of an arena's kept memory."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._start, self._stop = arena.kept, -1
        self._over = False

    def close(self) -> None:
        """What is kept from here on belongs to others."""
        self._stop = self._arena.kept

    def end(self) -> None:
        """Give the memory back; the pages stay for the next step. A second call does nothing."""
        with self._arena.lock:
            if not self._over:
                self._over = True
                self._arena._end(self._start, self._stop)

    def __del__(self) -> None:
        self.end()


def physical_bytes() -> int:
    """This machine's memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def on_huge_pages(n: int) -> Tensor:
    """[n] bytes (uint8) of the system's own, that nobody has touched yet, on pages of 2 MB where it can.

    Not the allocator's: what others used and gave back lies on small pages for good. Less than 2 MB is the allocator's.
    """
    page = 2 << 20
    if not sys.platform.startswith("linux") or n < page:
        return torch.empty(n, dtype=torch.uint8)
    held = mmap.mmap(-1, n + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(held, dtype=torch.uint8)
    first = -memory.data_ptr() % page
    whole = -(-n // page) * page
    _advise(memory.data_ptr() + first, whole if whole - n <= n // 16 else whole - page)
    return memory[first : first + n]


def ask_for_huge_pages(region: torch.UntypedStorage) -> None:
    """Advise the system to back memory that nobody has touched yet by pages of 2 MB, where it can."""
    if not sys.platform.startswith("linux"):
        return
    page = 2 << 20
    first = -(-region.data_ptr() // page) * page
    length = (region.data_ptr() + region.nbytes() - first) // page * page
    if length > 0:
        _advise(first, length)


def _advise(first: int, length: int) -> None:  # advice only: refused, it changes nothing
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _HUGE_PAGES)
