"""The timeline of a deep network from that of a short one, whose blocks do the same.

A short network has four units of blocks, 0 1 2 3, or five where the first two are unlike the others, and its timeline
is cut where operations go on to another unit's tensors: behind the last that reads the unit before, or else before the
first that reads the new one. Wherever a step goes through them, up or down, the pieces of the two inner units before
the last must be equal: the same is allocated, and what is freed lies at the same place, in the unit itself or in a
neighbour. They then stand for as many units as the deep network has beside the others. What is not so is refused, and
the deep network itself has to be traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from deltaw.plan.trace import Timeline

UNITS = 4
"""Units of a short network where one comes before the inner ones; one more for each further one."""
Key = tuple[int, int, int]
"""A storage of the deep network: (piece, number of its allocation in the piece, unit; 0 outside a pass)."""


class Unlike(Exception):
    """The units of this timeline do not do the same."""


@dataclass(frozen=True)
class _Event:
    """One event of a piece: `size` bytes are allocated or, below 0, freed; at (piece, number of the allocation)."""

    size: int
    at: tuple[int, int]
    cause: str = ""


@dataclass(frozen=True)
class _Inner:
    """One event of a unit in a pass.

    step   which unit holds what is freed: 0 the unit itself, 1 or -1 a neighbour
    outer  what is freed instead where that neighbour is no inner unit
    """

    size: int
    cause: str
    at: tuple[int, int]
    step: int = 0
    outer: tuple[int, int] = (0, 0)


def repeated(line: Timeline, units: int, low: int = 1) -> Timeline:
    """The timeline of `units` units, from that of a short network (at most as many) with its parts marked.

    low  units before the inner ones

    Raises Unlike where the inner units do not do the same.
    """
    labels: list[int | None] = [None, *(part for _, _, part in line.parts)]
    passes = _passes(labels, low)
    pieces = _pieces(line, _starts(line, passes))
    inner = {piece: (first, labels[piece]) for first, second in passes.items() for piece in (first, second)}
    merged = {a: _merged(pieces, labels, inner, a, b, low) for a, b in passes.items()}
    made = _Making(units, low)
    for piece, events in enumerate(pieces):
        if piece in passes:
            order = range(low, units - 1) if labels[piece] == low else range(units - 2, low - 1, -1)
            for unit in order:
                made.inner(merged[piece], piece, unit)
        elif piece not in inner:
            made.outer(events, inner)
    made.check()
    return made.timeline.settled()


def _starts(line: Timeline, passes: dict[int, int]) -> list[int]:
    """The first event of each piece, cut so that the inner ones of each pass do the same. Raises Unlike."""
    starts = [0, *(at for _, at, _ in line.parts)]
    found = [(size, line.cause[number]) for number, size in line.events]
    for first in passes:
        inner = slice(first, first + 3)
        for cuts in [after for after, _, _ in line.parts[first - 1 : first + 2]], starts[inner]:
            if found[cuts[0] : cuts[1]] == found[cuts[1] : cuts[2]]:
                starts[inner] = cuts
                break
        else:
            raise Unlike("the inner units allocate different things")
    return starts


def _pieces(line: Timeline, starts: list[int]) -> list[list[_Event]]:
    """The events of each piece."""
    pieces: list[list[_Event]] = []
    home: dict[int, tuple[int, int]] = {}
    for piece, (start, stop) in enumerate(zip(starts, [*starts[1:], len(line.events)], strict=True)):
        events: list[_Event] = []
        made = 0
        for number, size in line.events[start:stop]:
            if size > 0:
                home[number] = piece, made
                made += 1
            events.append(_Event(size, home[number], line.cause[number]))
        pieces.append(events)
    return pieces


def _passes(labels: list[int | None], low: int) -> dict[int, int]:
    """The two inner pieces of each way through the units, first -> second. Raises Unlike for any other way."""
    found: dict[int, int] = {}
    up = list(range(low + 3))
    for piece, label in enumerate(labels):
        if label in (low, low + 1) and piece - 1 not in found:
            before = low if label == low else 1  # pieces of outer units before these two
            if piece < before or labels[piece - before : piece - before + len(up)] not in (up, up[::-1]):
                raise Unlike(f"units are gone through in another order: {labels}")
            found[piece] = piece + 1
    return found


def _merged(
    pieces: list[list[_Event]],
    labels: list[int | None],
    inner: dict[int, tuple[int, int | None]],
    a: int,
    b: int,
    low: int,
) -> list[_Inner]:
    """What both inner units do in the pass that begins with piece `a`. Raises Unlike where they differ."""
    one, two = (pieces[a], pieces[b]) if labels[a] == low else (pieces[b], pieces[a])
    found: list[_Inner] = []
    for e, f in zip(one, two, strict=True):
        if e.size > 0:
            found.append(_Inner(e.size, e.cause, (a, e.at[1])))
            continue
        (p, of_e), (q, of_f) = inner.get(e.at[0], (-1, None)), inner.get(f.at[0], (-1, None))
        if (of_e, of_f) == (low, low + 1) and (p, e.at[1]) == (q, f.at[1]):
            found.append(_Inner(e.size, e.cause, (p, e.at[1])))
        elif of_e == low + 1 and of_f is None:
            found.append(_Inner(e.size, e.cause, (p, e.at[1]), 1, f.at))
        elif of_e is None and of_f == low:
            found.append(_Inner(e.size, e.cause, (q, f.at[1]), -1, e.at))
        else:
            raise Unlike("the inner units free different things")
    return found


class _Making:
    """A timeline that grows. Raises Unlike for what is freed twice or by some units only."""

    def __init__(self, units: int, low: int) -> None:
        self.timeline = Timeline()
        self._low, self._last = low, units - 2
        self._alive: dict[Key, int] = {}

    def inner(self, events: list[_Inner], piece: int, unit: int) -> None:
        """One unit of a pass."""
        alive, cause, made = self._alive, self.timeline.cause, self.timeline.events
        for e in events:
            if e.size > 0:  # as `_allocate`, which most of the time would go into calling
                alive[piece, e.at[1], unit] = number = len(cause)
                cause.append(e.cause)
                made.append((number, e.size))
            elif e.step and not self._low <= unit + e.step <= self._last:
                self._free((*e.outer, 0), e.size)
            else:
                self._free((*e.at, unit + e.step), e.size)

    def outer(self, events: list[_Event], inner: dict[int, tuple[int, int | None]]) -> None:
        """A piece of another unit, or of none."""
        at = 0
        while at < len(events):
            e = events[at]
            if e.size > 0:
                self._allocate((*e.at, 0), e.size, e.cause)
            elif e.at[0] not in inner:
                self._free((*e.at, 0), e.size)
            else:
                at += self._of_inner(events, at, inner)
                continue
            at += 1

    def _of_inner(self, events: list[_Event], at: int, inner: dict[int, tuple[int, int | None]]) -> int:
        """Free what inner units hold: those of all, one unit after the other, or those of the neighbour alone.

        Returns how many events that took.
        """
        here = list(_run(events, at, inner))
        there = list(_run(events, at + len(here), inner))
        mine, other = [key for key, _ in here], [key for key, _ in there]
        unit = here[0][1]
        if mine == other:
            order = range(self._low, self._last + 1) if unit == self._low else range(self._last, self._low - 1, -1)
            for n in order:
                for (key, _), e in zip(here, events[at:], strict=False):
                    self._free((*key, n), e.size)
            return len(here) + len(there)
        elsewhere = {
            (inner[e.at[0]][0], e.at[1])
            for e in events
            if e.size < 0 and e.at[0] in inner and inner[e.at[0]][1] != unit
        }
        if elsewhere & set(mine):
            raise Unlike("what inner units hold is freed in an order that cannot be repeated")
        for key, e in zip(mine, events[at:], strict=False):
            self._free((*key, unit if unit == self._low else self._last), e.size)
        return len(here)

    def check(self) -> None:
        """What is left of one inner unit is left of all."""
        left = Counter((piece, number) for piece, number, unit in self._alive if unit)
        if any(n != self._last - self._low + 1 for n in left.values()):
            raise Unlike("what inner units hold is freed by some only")

    def _allocate(self, key: Key, size: int, cause: str) -> None:
        self._alive[key] = number = len(self.timeline.cause)
        self.timeline.cause.append(cause)
        self.timeline.events.append((number, size))

    def _free(self, key: Key, size: int) -> None:
        number = self._alive.pop(key, None)
        if number is None:
            raise Unlike("what is freed is not there")
        self.timeline.events.append((number, size))


def _run(
    events: list[_Event], at: int, inner: dict[int, tuple[int, int | None]]
) -> Iterator[tuple[tuple[int, int], int]]:
    """From event `at` on, what is freed of one inner unit without a break: ((pass, number), unit)."""
    unit = None
    for e in events[at:]:
        if e.size > 0 or e.at[0] not in inner:
            return
        first, of = inner[e.at[0]]
        if unit is None:
            unit = of
        if of != unit or of is None:
            return
        yield (first, e.at[1]), of
