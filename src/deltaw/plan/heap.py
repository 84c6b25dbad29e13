"""What glibc's allocator holds for a sequence of large allocations: a model of its main arena.

Buffers under the mmap threshold lie in one heap that only grows at its end; the threshold rises to the largest mapped
buffer that was freed, at most 32 MB (malloc/malloc.c, M_MMAP_THRESHOLD). PyTorch allocates by posix_memalign, which in
glibc before 2.38 asks for the size, the alignment and a header more, so that a freed buffer has no room for one of its
own size until it is joined with a free neighbour.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

_MOST_MAPPED = 32 << 20
_FIRST = 128 << 10
_ASKED_MORE = 96
"""posix_memalign(64): the alignment and the smallest chunk."""
_PAGE = 4096


class Heap:
    """Sizes and places only; nothing is allocated.

    peak   the most that was held: the heap up to its highest end, and what is mapped
    """

    def __init__(self) -> None:
        self.peak = 0
        self._end = self._top = self._mapped = 0
        self._threshold = _FIRST
        self._size_at: dict[int, int] = {}
        self._start_of: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []
        self._used: dict[Hashable, tuple[int | None, int]] = {}

    def allocate(self, name: Hashable, size: int) -> None:
        """Take `size` bytes under `name`: the smallest free piece that has room, the heap's end, or a mapping."""
        size = max(32, (size + 23) & ~15)
        wanted = size + _ASKED_MORE
        found = bisect_left(self._free, (wanted, 0))
        if found < len(self._free):
            whole, at = self._free[found]
            self._take(whole, at)
            if whole - size >= 32:
                self._put(whole - size, at + size)
            else:
                size = whole
            self._used[name] = at, size
        elif wanted < self._threshold or self._end - self._top >= wanted:
            self._used[name] = self._top, size
            self._top += size
            self._end = max(self._end, self._top + _ASKED_MORE)
        else:
            mapped = -(-wanted // _PAGE) * _PAGE
            self._used[name] = None, mapped
            self._mapped += mapped
        self.peak = max(self.peak, self._end + self._mapped)

    def free(self, name: Hashable) -> None:
        """Give back what `name` holds, joined with its free neighbours."""
        at, size = self._used.pop(name)
        if at is None:
            self._mapped -= size
            if self._threshold < size <= _MOST_MAPPED:
                self._threshold = size
            return
        if at in self._start_of:
            before = self._start_of[at]
            size += self._size_at[before]
            self._take(self._size_at[before], before)
            at = before
        if at + size in self._size_at:
            behind = at + size
            size += self._size_at[behind]
            self._take(self._size_at[behind], behind)
        if at + size == self._top:
            self._top = at  # the end stays: in a real process something small lies there
        else:
            self._put(size, at)

    def _put(self, size: int, at: int) -> None:
        self._size_at[at], self._start_of[at + size] = size, at
        insort(self._free, (size, at))

    def _take(self, size: int, at: int) -> None:
        del self._size_at[at], self._start_of[at + size]
        self._free.pop(bisect_left(self._free, (size, at)))
