"""The timeline of a deep network from that of a short one, whose blocks do the same.

A short network has four units of blocks, 0 1 2 3, or five where the first two are unlike the others, and its timeline
is cut where operations go on to another unit's tensors: behind the last that reads the unit before, or else before the
first that reads the new one. Wherever a step goes through them, up or down, the pieces of the two inner units before
the last must be equal: the same is allocated, and what is freed lies at the same place, in the unit itself or in a
neighbour. They then stand for as many units as the deep network has beside the others. What is not so is refused, and
the deep network itself has to be traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from deltaw.plan.timeline import Integers, Timeline

UNITS = 4
"""Units of a short network where one comes before the inner ones; one more for each further one."""


class Unlike(Exception):
    """The units of this timeline do not do the same."""


@dataclass(frozen=True)
class _Event:
    """One event of a piece: `size` bytes are allocated or, below 0, freed; at (piece, number of the allocation)."""

    size: int
    at: tuple[int, int]
    cause: int = 0


@dataclass(frozen=True)
class _Inner:
    """One event of a unit in a pass.

    step   which unit holds what is freed: 0 the unit itself, 1 or -1 a neighbour
    outer  what is freed instead where that neighbour is no inner unit
    """

    size: int
    cause: int
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
            made.inner(merged[piece], piece, labels[piece] == low)
        elif piece not in inner:
            made.outer(events, inner)
    return made.ended().settled()


def _starts(line: Timeline, passes: dict[int, int]) -> list[int]:
    """The first event of each piece, cut so that the inner ones of each pass do the same. Raises Unlike."""
    starts = [0, *(at for _, at, _ in line.parts)]
    causes = line.cause.tolist()
    found = [(size, causes[number]) for number, size in line.events.tolist()]
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
    flat, causes = line.events.tolist(), line.cause.tolist()
    for piece, (start, stop) in enumerate(zip(starts, [*starts[1:], len(flat)], strict=True)):
        events: list[_Event] = []
        made = 0
        for number, size in flat[start:stop]:
            if size > 0:
                home[number] = piece, made
                made += 1
            events.append(_Event(size, home[number], causes[number]))
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


@dataclass(frozen=True)
class _Way:
    """The storages of one way through the inner units: `count` are allocated in each, from number `start` on."""

    start: int
    count: int
    up: bool


class _Making:
    """Events that grow, a way through the inner units or an outer piece at a time. Raises Unlike, at the end too."""

    def __init__(self, units: int, low: int) -> None:
        self._low, self._last = low, units - 2
        self._inner = units - 1 - low
        self._events: list[Integers] = []
        self._cause: list[int] = []
        self._outer: dict[tuple[int, int], int] = {}
        self._ways: dict[int, _Way] = {}

    def inner(self, events: list[_Inner], piece: int, up: bool) -> None:
        """What all inner units do in a pass, the lowest first or the highest."""
        causes = [e.cause for e in events if e.size > 0]
        self._ways[piece] = _Way(len(self._cause), len(causes), up)
        self._cause += causes * self._inner
        first = self._low if up else self._last
        start, more, edges = [], [], []
        for i, e in enumerate(events):
            way = self._way(e.at[0])
            start.append(self._number(way, e.at[1], first + e.step))
            more.append(way.count if way.up == up else -way.count)
            if e.step:  # beside the last unit in that direction is no inner one
                edges.append((-1 if (e.step > 0) == up else 0, i, self._free(e.outer)))
        found = np.empty((self._inner, len(events), 2), dtype=np.int64)
        found[:, :, 0] = np.array(start, dtype=np.int64) + np.outer(np.arange(self._inner), more)
        found[:, :, 1] = [e.size for e in events]
        for unit, i, number in edges:
            found[unit, i, 0] = number
        self._events.append(found.reshape(-1, 2))

    def outer(self, events: list[_Event], inner: dict[int, tuple[int, int | None]]) -> None:
        """A piece of another unit, or of none."""
        at = 0
        found: list[tuple[int, int]] = []
        while at < len(events):
            e = events[at]
            if e.size > 0:
                self._outer[e.at] = number = len(self._cause)
                self._cause.append(e.cause)
                found.append((number, e.size))
            elif e.at[0] not in inner:
                found.append((self._free(e.at), e.size))
            else:
                freed, taken = self._of_inner(events, at, inner)
                found += freed
                at += taken
                continue
            at += 1
        self._events.append(np.array(found, dtype=np.int64).reshape(-1, 2))

    def _of_inner(
        self, events: list[_Event], at: int, inner: dict[int, tuple[int, int | None]]
    ) -> tuple[list[tuple[int, int]], int]:
        """What frees what inner units hold: of all, one unit after the other, or of the neighbour alone.

        Returns (events, how many of the short network's it stands for).
        """
        here = list(_run(events, at, inner))
        there = list(_run(events, at + len(here), inner))
        mine, other = [key for key, _ in here], [key for key, _ in there]
        sizes = [e.size for e in events[at : at + len(here)]]
        unit = here[0][1]
        if mine == other:
            order = range(self._low, self._last + 1) if unit == self._low else range(self._last, self._low - 1, -1)
            return self._of_units(mine, sizes, order), len(here) + len(there)
        elsewhere = {
            (inner[e.at[0]][0], e.at[1])
            for e in events
            if e.size < 0 and e.at[0] in inner and inner[e.at[0]][1] != unit
        }
        if elsewhere & set(mine):
            raise Unlike("what inner units hold is freed in an order that cannot be repeated")
        return self._of_units(mine, sizes, [unit if unit == self._low else self._last]), len(here)

    def _of_units(self, keys: list[tuple[int, int]], sizes: list[int], units: Iterable[int]) -> list[tuple[int, int]]:
        held = [(self._way(piece), number, size) for (piece, number), size in zip(keys, sizes, strict=True)]
        return [(self._number(way, number, unit), size) for unit in units for way, number, size in held]

    def ended(self) -> Timeline:
        """The timeline. What is freed was there, and what is left of one inner unit is left of all."""
        events = np.concatenate(self._events)
        cause = np.array(self._cause, dtype=np.int64)
        made, freed = (np.flatnonzero(events[:, 1] > 0), np.flatnonzero(events[:, 1] < 0))
        numbers = events[freed, 0]
        left = np.ones(len(cause), dtype=bool)
        left[numbers] = False
        if len(cause) - left.sum() != len(numbers) or (made[numbers] > freed).any():
            raise Unlike("what is freed is not there")
        for way in self._ways.values():
            of_all = left[way.start : way.start + way.count * self._inner].reshape(self._inner, way.count)
            if (of_all != of_all[0]).any():
                raise Unlike("what inner units hold is freed by some only")
        return Timeline(events, cause)

    def _way(self, piece: int) -> _Way:
        if (found := self._ways.get(piece)) is None:
            raise Unlike("what is freed is not there")
        return found

    def _number(self, way: _Way, number: int, unit: int) -> int:
        """The storage of an inner unit."""
        return way.start + number + way.count * (unit - self._low if way.up else self._last - unit)

    def _free(self, key: tuple[int, int]) -> int:
        """The storage of an outer piece that is freed."""
        if (number := self._outer.pop(key, None)) is None:
            raise Unlike("what is freed is not there")
        return number


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
