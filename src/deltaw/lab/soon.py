"""Answers in parts: what takes longer than a slider may wait is made by a thread beside, and asked for again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import Any

from deltaw.ops.native.library import and_end_threads

WAIT_S = 0.06
"""How long a request waits for parts. With them computing beside it, it is answered some 10 ms later."""


class Soon:
    """Makes the parts of one answer at a time, one after the other, in a thread of its own."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(1, "soon")
        self._key: Hashable = None
        self._parts: dict[str, Future[Any]] = {}

    def get(self, key: Hashable, makers: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
        """What `makers` make, by name: all of it, or what is there after WAIT_S. The rest is made meanwhile.

        key  what is asked for. Under another one, what has not begun of this is dropped: who still wants it asks again

        Raises what a maker raised.
        """
        with self._lock:
            if key != self._key:
                for part in self._parts.values():
                    part.cancel()
                self._parts = {name: self._pool.submit(and_end_threads, make) for name, make in makers.items()}
                self._key = key
            parts = dict(self._parts)
        wait(parts.values(), WAIT_S, FIRST_EXCEPTION)
        try:
            return {name: part.result() for name, part in parts.items() if part.done() and not part.cancelled()}
        except Exception:
            with self._lock:
                if key == self._key:
                    self._key = None  # tried anew by who asks again
            raise
