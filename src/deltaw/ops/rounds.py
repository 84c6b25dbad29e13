"""Loops over parts of rows whose rounds all do the same: who only counts memory need not run every one.

A planner (plan/trace.py) runs operations on tensors without numbers. There the third round allocates and frees what
the second did, and so does the hundredth: a watcher sees that, and the rounds between are not run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Watcher(Protocol):
    """Who counts what rounds take, for the loops of its own thread."""

    def mark(self) -> tuple[int, ...]:
        """Where it stands: between two rounds."""

    def again(self, marks: list[tuple[int, ...]]) -> bool:
        """Whether the last round stands for those to come that are as large.

        marks  of the rounds so far, the last behind the last round
        """


class _Watched(threading.local):
    by: Watcher | None = None


_watched = _Watched()


@contextmanager
def watched(by: Watcher) -> Iterator[None]:
    """Inside, `by` is asked after each round."""
    before, _watched.by = _watched.by, by
    try:
        yield
    finally:
        _watched.by = before


def rounds(n: int, step: int) -> Iterator[slice]:
    """Parts of `n` rows, `step` at a time; the last may be smaller.

    What is done with a part must not depend on which it is but in its numbers: inside `watched`, not all come.
    """
    by, marks = _watched.by, []
    if by is not None:
        marks.append(by.mark())
    at = 0
    while at < n:
        yield slice(at, min(at + step, n))
        at += step
        left = (n - at) // step  # as large as this one
        if by is not None and left > 0:
            marks.append(by.mark())
            if by.again(marks):
                at += left * step
