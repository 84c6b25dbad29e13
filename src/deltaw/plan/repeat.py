"""The timeline of a deep network from that of a short one, whose blocks do the same.

A short network has four units of blocks, 0 1 2 3, or five where the first two are unlike the others, and its timeline
is cut where operations go on to another unit's tensors: behind the last that reads the unit before, or else before the
first that reads the new one. Wherever a step goes through them, up or down, the pieces of the two inner units before
the last must be equal: the same is allocated, and what is freed lies at the same place, in the unit itself or in a
neighbour. They then stand for as many units as the deep network has beside the others. What is not so is refused, and
the deep network itself has to be traced.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltaw.plan.timeline import Integers, Timeline

UNITS = 4
"""Units of a short network where one comes before the inner ones; one more for each further one."""


class Unlike(Exception):
    """The units of this timeline do not do the same."""


@dataclass(frozen=True)
class _Few:
    """The short network's timeline, cut into pieces.

    starts  the first event of each piece, and the end
    piece   in which each storage is allocated
    number  its number among those of that piece
    way     the first piece of the pass that a piece belongs to; -1: it is no inner unit's
    unit    whose inner piece it is; -1: none's
    """

    line: Timeline
    starts: Integers
    piece: Integers
    number: Integers
    way: Integers
    unit: Integers

    @classmethod
    def of(cls, line: Timeline, starts: list[int], passes: dict[int, int], labels: list[int | None]) -> _Few:
        """The pieces of a timeline; passes: the two inner pieces of each."""
        bounds = np.array([*starts, len(line.events)], dtype=np.int64)
        made = np.flatnonzero(line.events[:, 1] > 0)
        piece = np.searchsorted(bounds, made, side="right") - 1
        way, unit = np.full(len(starts), -1), np.full(len(starts), -1)
        for first, second in passes.items():
            way[[first, second]] = first
            unit[[first, second]] = labels[first], labels[second]
        return cls(line, bounds, piece, np.arange(len(made)) - np.searchsorted(piece, piece), way, unit)

    def events(self, piece: int) -> Integers:
        """[n, 2] of a piece."""
        found: Integers = self.line.events[self.starts[piece] : self.starts[piece + 1]]
        return found


@dataclass(frozen=True)
class _Inner:
    """What a unit does in a pass; one entry an event.

    way, number  what is allocated or freed: the pass in which it is allocated, and its number there
    step         which unit holds what is freed: 0 the unit itself, 1 or -1 a neighbour
    outer        the short network's storage that is freed instead where that neighbour is no inner unit
    """

    sizes: Integers
    causes: Integers
    way: Integers
    number: Integers
    step: Integers
    outer: Integers


def repeated(line: Timeline, units: int, low: int = 1) -> Timeline:
    """The timeline of `units` units, from that of a short network (at most as many) with its parts marked.

    low  units before the inner ones

    Raises Unlike where the inner units do not do the same.
    """
    labels: list[int | None] = [None, *(part for _, _, part in line.parts)]
    passes = _passes(labels, low)
    few = _Few.of(line, _starts(line, passes), passes, labels)
    merged = {a: _merged(few, *((a, b) if labels[a] == low else (b, a)), low) for a, b in passes.items()}
    made = _Making(few, units, low)
    for piece in range(len(labels)):
        if piece in passes:
            made.inner(merged[piece], piece, labels[piece] == low)
        elif few.way[piece] < 0:
            made.outer(piece)
    return made.ended().settled()


def _starts(line: Timeline, passes: dict[int, int]) -> list[int]:
    """The first event of each piece, cut so that the inner ones of each pass do the same. Raises Unlike."""
    starts = [0, *(at for _, at, _ in line.parts)]
    found = np.stack([line.events[:, 1], line.cause[line.events[:, 0]]], axis=1)
    for first in passes:
        inner = slice(first, first + 3)
        for cuts in [after for after, _, _ in line.parts[first - 1 : first + 2]], starts[inner]:
            if np.array_equal(found[cuts[0] : cuts[1]], found[cuts[1] : cuts[2]]):
                starts[inner] = cuts
                break
        else:
            raise Unlike("the inner units allocate different things")
    return starts


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


def _merged(few: _Few, lower: int, upper: int, low: int) -> _Inner:
    """What both inner units do in a pass, given its pieces. Raises Unlike where they free different things."""
    (one, sizes), (two, _) = few.events(lower).T, few.events(upper).T
    (way, unit, number), (way_2, unit_2, number_2) = (
        (few.way[few.piece[n]], few.unit[few.piece[n]], few.number[n]) for n in (one, two)
    )
    made = sizes > 0
    own = (unit == low) & (unit_2 == low + 1) & (way == way_2) & (number == number_2)
    above, below = (unit == low + 1) & (unit_2 < 0), (unit < 0) & (unit_2 == low)
    if not (made | own | above | below).all():
        raise Unlike("the inner units free different things")
    return _Inner(
        sizes,
        few.line.cause[one[made]],
        np.where(below, way_2, way),
        np.where(below, number_2, number),
        np.where(made | own, 0, np.where(above, 1, -1)),
        np.where(above, two, one),
    )


class _Making:
    """Events that grow, a way through the inner units or an outer piece at a time. Raises Unlike, at the end too.

    In a pass each inner unit allocates `count` storages; unit after unit they are numbered from `start` on.
    """

    def __init__(self, few: _Few, units: int, low: int) -> None:
        self._few = few
        self._low, self._last = low, units - 2
        self._inner = units - 1 - low
        self._events: list[Integers] = []
        self._cause: list[Integers] = []
        self._made = 0
        pieces = len(few.way)
        self._start, self._count = np.full(pieces, -1), np.zeros(pieces, dtype=np.int64)
        self._up = np.zeros(pieces, dtype=bool)
        self._outer = np.full(len(few.piece), -1)  # by the short network's storage

    def inner(self, unit: _Inner, piece: int, up: bool) -> None:
        """What all inner units do in a pass, the lowest first or the highest."""
        self._start[piece], self._count[piece], self._up[piece] = self._made, len(unit.causes), up
        self._allocate(np.tile(unit.causes, self._inner))
        units = np.arange(self._low, self._last + 1)[:: 1 if up else -1]
        found = np.empty((self._inner, len(unit.sizes), 2), dtype=np.int64)
        found[:, :, 0] = self._numbers(unit.way, unit.number, units[:, None] + unit.step)
        found[:, :, 1] = unit.sizes
        for row, step in ((-1, 1 if up else -1), (0, -1 if up else 1)):  # beside it in that direction is no inner unit
            at = unit.step == step
            found[row, at, 0] = self._of_outer(unit.outer[at])
        self._events.append(found.reshape(-1, 2))

    def outer(self, piece: int) -> None:
        """A piece of another unit, or of none."""
        few = self._few
        events = few.events(piece)
        numbers, sizes = events.T
        made = numbers[sizes > 0]
        self._outer[made] = self._made + np.arange(len(made))
        self._allocate(few.line.cause[made])
        of_inner = np.flatnonzero(few.way[few.piece[numbers]] >= 0)
        at = 0
        while at < len(events):
            after = of_inner[np.searchsorted(of_inner, at) :]
            if len(after) == 0 or after[0] > at:
                stop = int(after[0]) if len(after) else len(events)
                self._events.append(np.stack([self._of_outer(numbers[at:stop]), sizes[at:stop]], axis=1))
                at = stop
            else:
                at += self._of_inner(events, at)

    def _of_inner(self, events: Integers, at: int) -> int:
        """Free what inner units hold: those of all, one unit after the other, or those of the neighbour alone.

        Returns how many events that took.
        """
        here = self._run(events, at)
        there = self._run(events, at + len(here))
        unit = int(self._few.unit[self._few.piece[here[0, 0]]])
        if self._keys(here) == self._keys(there):
            units = np.arange(self._low, self._last + 1)
            self._free(here, units if unit == self._low else units[::-1])
            return len(here) + len(there)
        freed = events[events[:, 1] < 0]
        unit_of = self._few.unit[self._few.piece[freed[:, 0]]]
        if set(self._keys(freed[(unit_of >= 0) & (unit_of != unit)])) & set(self._keys(here)):
            raise Unlike("what inner units hold is freed in an order that cannot be repeated")
        self._free(here, np.array([unit if unit == self._low else self._last]))
        return len(here)

    def _run(self, events: Integers, at: int) -> Integers:
        """From event `at` on, what is freed of one inner unit without a break."""
        units = self._few.unit[self._few.piece[events[at:, 0]]]
        other = np.flatnonzero((units != units[0]) | (units < 0)) if len(units) else units
        return events[at : at + int(other[0])] if len(other) else events[at:]

    def _keys(self, events: Integers) -> list[tuple[int, int]]:
        numbers = events[:, 0]
        few = self._few
        return list(zip(few.way[few.piece[numbers]].tolist(), few.number[numbers].tolist(), strict=True))

    def _free(self, events: Integers, units: Integers) -> None:
        """What one unit frees in these events, for each of `units`."""
        few, numbers = self._few, events[:, 0]
        found = np.empty((len(units), len(events), 2), dtype=np.int64)
        found[:, :, 0] = self._numbers(few.way[few.piece[numbers]], few.number[numbers], units[:, None])
        found[:, :, 1] = events[:, 1]
        self._events.append(found.reshape(-1, 2))

    def _allocate(self, causes: Integers) -> None:
        self._cause.append(causes)
        self._made += len(causes)

    def _numbers(self, way: Integers, number: Integers, unit: Integers) -> Integers:
        """The storages of inner units."""
        if (self._start[way] < 0).any():
            raise Unlike("what is freed is not there")
        place = np.where(self._up[way], unit - self._low, self._last - unit)
        found: Integers = self._start[way] + number + self._count[way] * place
        return found

    def _of_outer(self, numbers: Integers) -> Integers:
        """The storages of outer pieces, from the short network's."""
        found: Integers = self._outer[numbers]
        if (found < 0).any():
            raise Unlike("what is freed is not there")
        return found

    def ended(self) -> Timeline:
        """The timeline. What is freed was there, and what is left of one inner unit is left of all."""
        events, cause = np.concatenate(self._events), np.concatenate(self._cause)
        made, freed = (np.flatnonzero(sign * events[:, 1] > 0) for sign in (1, -1))
        numbers = events[freed, 0]
        left = np.ones(len(cause), dtype=bool)
        left[numbers] = False
        if len(cause) - left.sum() != len(numbers) or (made[numbers] > freed).any():
            raise Unlike("what is freed is not there")
        for piece in np.flatnonzero(self._start >= 0):
            start, count = self._start[piece], self._count[piece]
            of_all = left[start : start + count * self._inner].reshape(self._inner, count)
            if (of_all != of_all[0]).any():
                raise Unlike("what inner units hold is freed by some only")
        return Timeline(events, cause)
