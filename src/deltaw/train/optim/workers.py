"""Threads that each compute on one core, so that pages are updated side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from queue import SimpleQueue

import torch

MOST = 16
"""Threads that update pages at a time; beyond, the interpreter's lock is the limit."""


class Workers:
    """`n` threads (0: the caller's own, and torch's threads inside each operation).

    PyTorch would split every operation of a thread over all cores again, and its threads would wait for each other at
    each of them. In these threads it computes on one core; everywhere else its number of threads stays as it is.
    """

    def __init__(self, n: int) -> None:
        self.n_slots = max(1, n)
        self._slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(self.n_slots):
            self._slots.put(slot)
        self._n = n
        self._pool: ThreadPoolExecutor | None = None

    def each(self, do: Callable[[int, int], int], items: Sequence[int]) -> int:
        """The sum of do(item, slot) over `items`, begun in their order; no two at a time have the same slot.

        What `do` raises is raised here, after the others that were begun have ended.
        """
        if self._n == 0:
            return sum(do(item, 0) for item in items)
        if self._pool is None:
            self._pool = _started(self._n)
        stop = threading.Event()
        futures = [self._pool.submit(self._one, do, item, stop) for item in items]
        try:
            return sum(future.result() for future in futures)
        finally:
            stop.set()
            wait(futures)

    def _one(self, do: Callable[[int, int], int], item: int, stop: threading.Event) -> int:
        if stop.is_set():
            return 0
        slot = self._slots.get()
        try:
            return do(item, slot)
        except BaseException:
            stop.set()
            raise
        finally:
            self._slots.put(slot)


def _started(n: int) -> ThreadPoolExecutor:
    """A pool whose threads are all there, each with one core to compute on."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(n, "deltaw-optimizer", initializer=torch.set_num_threads, initargs=(1,))
    all_there = threading.Barrier(n)
    wait([pool.submit(all_there.wait) for _ in range(n)])
    torch.set_num_threads(threads)  # what threads begun later take over; the workers keep theirs
    return pool
