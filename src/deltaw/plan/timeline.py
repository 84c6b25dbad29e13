"""What is allocated and freed, in order, and what that comes to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaw.ops.arena import ALIGN
from deltaw.ops.pool import taken

CAUSES = ("activations", "logits", "workspace", "gradients")
ADDED = "added:"
"""Stands before the cause of what is added to a gradient and then given back."""
KEPT, LENT = "kept:", "lent:"
"""Stand before the cause of what an arena (ops/arena.py) keeps, or lends for a moment."""
PLACES = ("", ADDED, KEPT, LENT)
NAMES = tuple(place + cause for place in PLACES for cause in CAUSES)
"""What a storage is called. In a timeline its place here stands for it."""
_PLACE_OF = {name: i for i, name in enumerate(NAMES)}
_GRADIENTS = NAMES.index("gradients")
Integers = NDArray[np.int64]


@dataclass
class Timeline:
    """What was allocated and freed, in order.

    events    [n, 2]: (storage, bytes), bytes negative where it is freed
    cause     of each storage, which are numbered as they are allocated: its place in NAMES
    lent      the most bytes that an arena lent at once
    unseen    what an arena kept at its peak beyond the tensors that were alive: a lease may outlive them
    reads     whether an operation looked into the base's linear maps, or into what was there for no reason known
    parts     (after, at, part): at event `at` an operation first reads this part of the network (`Tracer`); from event
              `after` on, none reads the part before
    """

    events: Integers
    cause: Integers
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    lent: int = 0
    unseen: int = 0
    reads: bool = False

    @classmethod
    def of(cls, events: list[tuple[int, int]], cause: list[str], parts: Any = (), **more: Any) -> Timeline:
        """The timeline of a list of events, and the causes by name."""
        flat = np.fromiter(chain.from_iterable(events), dtype=np.int64, count=2 * len(events))
        places = np.fromiter(map(_PLACE_OF.__getitem__, cause), dtype=np.int64, count=len(cause))
        return cls(flat.reshape(-1, 2), places, list(parts), **more)

    def begun(self, n: int, sizes: dict[int, int]) -> Timeline:
        """The same, where of the `n` storages that the first events allocate only those in `sizes` are, so large."""
        if n == 0:
            return self
        kept = np.array(sorted(sizes), dtype=np.int64)
        begin = np.stack([np.arange(len(kept)), [sizes[i] for i in kept.tolist()]], axis=1)
        events = np.concatenate([begin, self.events[n:] - (n - len(kept), 0)])
        cause = np.concatenate([self.cause[kept], self.cause[n:]])

        def moved(event: int) -> int:
            return int(np.searchsorted(kept, min(event, n))) + max(0, event - n)

        return replace(
            self, events=events, cause=cause, parts=[(moved(a), moved(b), part) for a, b, part in self.parts]
        )

    @property
    def named(self) -> list[str]:
        """The cause of each storage by name."""
        return [NAMES[c] for c in self.cause.tolist()]

    def settled(self) -> Timeline:
        """The same, in an order of its own where autograd leaves it open, and takes another one in each block.

        Gradients that are handed on one after the other come by size, then by what they copy; those that were added to
        others and are freed one after the other by size, then as they were made. Parts are kept apart.
        """
        bounds = np.array([event for part in self.parts for event in part[:2]], dtype=np.int64)
        return self._copies_in_order(bounds)._added_in_order(bounds)

    def _copies_in_order(self, bounds: Integers) -> Timeline:
        at = self._handed_on()
        if len(at) < 2:
            return self
        numbers, sizes = self.events.T
        order = np.lexsort((numbers[at + 1], sizes[at], _runs(at, 2, bounds)))
        if (order[1:] > order[:-1]).all():
            return self
        events = self.events.copy()
        events[at], events[at + 1] = self.events[at[order]], self.events[at[order] + 1]
        made = events[events[:, 1] > 0, 0]
        events[:, 0] = np.argsort(made)[events[:, 0]]
        return replace(self, events=events, cause=self.cause[made])

    def _added_in_order(self, bounds: Integers) -> Timeline:
        at = np.flatnonzero((self.events[:, 1] < 0) & (self._place()[self.events[:, 0]] == PLACES.index(ADDED)))
        if len(at) < 2:
            return self
        numbers, sizes = self.events[at].T
        order = np.lexsort((numbers, sizes, _runs(at, 1, bounds)))
        if (order[1:] > order[:-1]).all():
            return self
        events = self.events.copy()
        events[at] = self.events[at[order]]
        return replace(self, events=events)

    def _handed_on(self) -> Integers:
        """The events where a gradient is copied: allocated, and what was computed is freed in the next."""
        numbers, sizes = self.events.T
        copied = (sizes > 0) & (self.cause[numbers] == _GRADIENTS)
        return np.flatnonzero(copied[:-1] & (sizes[:-1] == -sizes[1:]))

    def peak(self) -> dict[str, int]:
        """Bytes by cause at the moment when most is alive."""
        numbers, sizes = self.events.T
        alive = np.cumsum(sizes)
        at = int(alive.argmax()) + 1 if len(alive) and alive.max() > 0 else 0
        what = self.cause[numbers[:at]] % len(CAUSES)
        return {cause: int(sizes[:at][what == i].sum()) for i, cause in enumerate(CAUSES)}

    def arena(self) -> int:
        """Bytes that an arena touches. Its two stacks grow to their own peaks, and never shrink."""
        return self.kept() + self.unseen + self.lent

    def kept(self) -> int:
        """The most bytes of tensors that an arena kept at once, in its steps of ALIGN."""
        numbers, sizes = self.events.T
        here = sizes[self._place()[numbers] == PLACES.index(KEPT)]
        whole = -(-np.abs(here) // ALIGN) * ALIGN * np.sign(here)
        return int(np.cumsum(whole).max(initial=0))

    def held(self) -> int:
        """The most bytes beside the arena that are alive at once, as the pool of buffers (ops/pool.py) takes them."""
        beside = self.events[self._place()[self.events[:, 0]] < PLACES.index(KEPT), 1]
        return int(np.cumsum(taken(beside)).max(initial=0))

    def _place(self) -> Integers:
        """Where each storage lies: its place in PLACES."""
        return self.cause // len(CAUSES)


def _runs(at: Integers, step: int, bounds: Integers) -> Integers:
    """Which run each of the events belongs to: those that come every `step` events, and no bound between them."""
    begins = np.ones(len(at), dtype=bool)
    begins[1:] = (at[1:] != at[:-1] + step) | np.isin(at[1:], bounds)
    found: Integers = np.cumsum(begins)
    return found
