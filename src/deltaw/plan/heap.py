"""What glibc's allocator holds for a sequence of large allocations: a model of its main arena.

Buffers under the mmap threshold lie in one heap that grows and is trimmed at its end; the threshold rises to the
largest mapped buffer that was freed, at most 32 MB, and the end is given back where twice the threshold is free
(malloc/malloc.c, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD). PyTorch allocates by posix_memalign, which in glibc before 2.38
asks for the size, the alignment and a header more, so that a freed buffer has no room for one of its own size until it
is joined with a free neighbour.

What it cuts off goes to whatever small is allocated next, or to a cache of small pieces that are not joined: some
buffers cannot be joined with their neighbours until the step's graph is gone. Which ones is chance. Here it is every
eighth, which came nearest to the heaps of real steps whose allocations were all recorded (docs/log.md): GPT-2 with and
without checkpointing, and fused blocks, where little lies in the heap.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left, insort
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from deltaw.ops.native.library import running

_MOST_MAPPED = 32 << 20
_FIRST = 128 << 10
_ASKED_MORE = 96
"""posix_memalign(64): the alignment and the smallest chunk."""
_PAGE = 4096
_PAD = 128 << 10
_STUCK_EVERY = 8
_STUCK_FROM = 256 << 10
SETTLED = (-1, 0)


def most_held(events: Sequence[tuple[int, int]] | NDArray[np.int64], storages: int, repeats: int) -> int:
    """The most that is held when `events` come `repeats` times; what is left of one time goes before the next.

    events    (storage, bytes), bytes negative where it is freed; storages are numbered from 0 to `storages`; SETTLED
              where the step's graph is gone

    The compiled form (ops/native/heap.cpp) does what `Heap` does, in a thirtieth of the time.
    """
    flat = np.ascontiguousarray(events, dtype=np.int64)
    native = running()
    if native is not None:
        native[0].deltaw_heap_peak.restype = ctypes.c_int64
        numbers = (ctypes.c_int64(n) for n in (len(flat), storages, repeats))
        return int(native[0].deltaw_heap_peak(ctypes.c_void_p(flat.ctypes.data), *numbers))
    heap = Heap()
    for _ in range(repeats):
        left = set()
        for number, size in flat.tolist():
            if number < 0:
                heap.settle()
            elif size > 0:
                heap.allocate(number, size)
                left.add(number)
            elif number in left:
                heap.free(number)
                left.discard(number)
        for number in left:
            heap.free(number)
    return heap.peak


class Heap:
    """Sizes and places only; nothing is allocated.

    peak   the most that was held: the heap up to its end, and what is mapped
    """

    def __init__(self) -> None:
        self.peak = 0
        self._end = self._top = self._mapped = 0
        self._threshold = _FIRST
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []
        self._used: dict[Hashable, tuple[int | None, int]] = {}
        self._stuck: list[int] = []
        self._large = 0

    def allocate(self, name: Hashable, size: int) -> None:
        """Take `size` bytes under `name`: the smallest free piece that has room, the heap's end, or a mapping."""
        size = max(32, (size + 23) & ~15)
        wanted = size + _ASKED_MORE
        found = bisect_left(self._free, (wanted, 0))
        if found < len(self._free):
            whole, at = self._free[found]
            self._take(whole, at)
            rest = whole - size - self._stick(at + size, size)
            if rest >= 32:
                self._put(rest, at + whole - rest)
            else:
                size += rest
            self._used[name] = at, size
        elif wanted < self._threshold or self._end - self._top >= wanted:
            if self._end - self._top < wanted:
                self._end = self._top + wanted + _PAD
            self._used[name] = self._top, size
            self._top += size + self._stick(self._top + size, size)
        else:
            mapped = -(-wanted // _PAGE) * _PAGE
            self._used[name] = None, mapped
            self._mapped += mapped
        self.peak = max(self.peak, self._end + self._mapped)

    def free(self, name: Hashable) -> None:
        """Give back what `name` holds, joined with its free neighbours."""
        at, size = self._used.pop(name)
        if at is not None:
            self._release(at, size)
            return
        self._mapped -= size
        if self._threshold < size <= _MOST_MAPPED:
            self._threshold = size

    def settle(self) -> None:
        """The step's graph is gone, and with it what kept buffers apart."""
        stuck, self._stuck = self._stuck, []
        for at in stuck:
            self._release(at, _ASKED_MORE)

    def _stick(self, at: int, size: int) -> int:
        """How many bytes behind a buffer of `size` something small takes: none, or those that were asked for more."""
        self._large += size >= _STUCK_FROM
        if size < _STUCK_FROM or self._large % _STUCK_EVERY:
            return 0
        self._stuck.append(at)
        return _ASKED_MORE

    def _release(self, at: int, size: int) -> None:
        if at in self._start_of:
            before = self._start_of[at]
            size += self._size_at[before]
            self._take(self._size_at[before], before)
            at = before
        if at + size in self._size_at:
            behind = at + size
            size += self._size_at[behind]
            self._take(self._size_at[behind], behind)
        if at + size < self._top:
            self._put(size, at)
            return
        self._top = at
        if self._end - at >= 2 * self._threshold:
            self._end = at + _PAD

    def _put(self, size: int, at: int) -> None:
        self._size_at[at], self._start_of[at + size] = size, at
        insort(self._free, (size, at))

    def _take(self, size: int, at: int) -> None:
        del self._size_at[at], self._start_of[at + size]
        self._free.pop(bisect_left(self._free, (size, at)))
