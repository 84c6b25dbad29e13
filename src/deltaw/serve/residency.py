"""Adapters on disk, in memory, in the engine: by bytes, the least recently used leave first, never one in use.

Everything here runs on the event loop but reading, checking, loading and unloading: those run in one thread of their
own, so that running requests go on.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

from deltaw.core.adapter import Adapter
from deltaw.errors import ServeError
from deltaw.ops.native.library import and_end_threads
from deltaw.serve.words import Words

T = TypeVar("T")


class Loads(Protocol):
    """What residency needs of the engine: put in and take out under a name, between two steps, in this order."""

    def begin_load(self, name: str, adapter: Adapter) -> Future[None]: ...

    def begin_unload(self, name: str) -> Future[None]: ...


@dataclass(frozen=True)
class Loaded:
    """An adapter in memory, checked, with its words."""

    adapter: Adapter
    words: Words
    n_bytes: int


@dataclass(frozen=True)
class Card:
    """What a name means now.

    name, version  version is None for an adapter that was given by its path
    id             the adapter's content; "" is the base
    read           reads and checks it, in residency's thread; raises DeltawError
    labels, method, added   for the list of models
    """

    name: str
    version: int | None = None
    id: str = ""
    read: Callable[[], Loaded] | None = None
    labels: tuple[str, ...] = ()
    method: str | None = None
    added: int = 0

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


class Tier:
    """Things by id, in the order of their last use, with their bytes together."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.bytes = 0
        self.evictions = 0
        self.items: OrderedDict[str, Loaded] = OrderedDict()

    def get(self, key: str) -> Loaded | None:
        """The one with this id, as the most recently used; None where it is not here."""
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: str, value: Loaded) -> None:
        """Keep one; the caller has made room."""
        self.items[key] = value
        self.bytes += value.n_bytes

    def pop(self, key: str) -> None:
        """Forget one, if it is here."""
        if (gone := self.items.pop(key, None)) is not None:
            self.bytes -= gone.n_bytes

    def oldest(self, n_bytes: int, pins: Counter[str]) -> str | None:
        """Who must leave before `n_bytes` more fit; None: they fit, or all are in use."""
        if self.bytes + n_bytes <= self.budget:
            return None
        return next((key for key in self.items if not pins[key]), None)


class Lease:
    """An adapter that stays in the engine until `release`."""

    def __init__(self, residency: Residency, key: str, words: Words) -> None:
        self._residency: Residency | None = residency
        self.key = key
        self.words = words

    def release(self) -> None:
        """Its requests have ended; once."""
        if self._residency is not None:
            self._residency._unpin(self.key)
            self._residency = None


class Residency:
    """Who is in memory and in the engine."""

    def __init__(self, engine: Loads, host_bytes: int, active_bytes: int) -> None:
        self.host, self.active = Tier(host_bytes), Tier(active_bytes)
        self.loads: Counter[tuple[str, str]] = Counter()  # (tier, "done" or "failed")
        self._engine = engine
        self._pins: Counter[str] = Counter()
        self._tasks: dict[tuple[str, str], asyncio.Task[Loaded]] = {}
        self._door = asyncio.Lock()
        self._unpinned = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "deltaw-adapters")

    async def lease(self, card: Card) -> Lease:
        """`card`'s adapter in the engine, to stay there until the lease is released. Raises DeltawError."""
        self._pins[card.id] += 1
        try:
            found = self.active.get(card.id) or await self._once("active", card)
        except BaseException:
            self._unpin(card.id)
            raise
        return Lease(self, card.id, found.words)

    async def words(self, card: Card) -> Words:
        """The words of `card`'s adapter; it is read into memory if need be. Raises DeltawError."""
        found = self.active.get(card.id) or self.host.get(card.id) or await self._once("host", card)
        return found.words

    async def drop(self, key: str) -> None:
        """Let go of an adapter that has no name any more; one in use leaves when it is the least recently used."""
        self.host.pop(key)
        async with self._door:
            if key in self.active.items and not self._pins[key]:
                self.active.pop(key)
                self._engine.begin_unload(key)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _once(self, tier: str, card: Card) -> Loaded:
        """Load into a tier; who asks meanwhile waits for the same load. A caller that goes away stops nothing."""
        key = (tier, card.id)
        if key not in self._tasks:
            task = asyncio.ensure_future(self._activate(card) if tier == "active" else self._read(card))
            task.add_done_callback(lambda done: self._loaded(key, done))
            self._tasks[key] = task
        return await asyncio.shield(self._tasks[key])

    def _loaded(self, key: tuple[str, str], done: asyncio.Task[Loaded]) -> None:
        del self._tasks[key]
        failed = done.cancelled() or done.exception() is not None
        self.loads[key[0], "failed" if failed else "done"] += 1

    async def _read(self, card: Card) -> Loaded:
        assert card.read is not None
        found = await self._aside(card.read)
        if found.n_bytes > self.host.budget or card.id in self.host.items:
            return found
        while (old := self.host.oldest(found.n_bytes, Counter())) is not None:
            self.host.pop(old)
            self.host.evictions += 1
        self.host.put(card.id, found)
        return found

    async def _activate(self, card: Card) -> Loaded:
        found = self.host.get(card.id) or await self._once("host", card)
        if found.n_bytes > self.active.budget:
            raise ServeError(
                f"Adapter {card} takes {found.n_bytes / 2**20:.1f} MB, and the server has "
                f"{self.active.budget / 2**20:.1f} MB for adapters in use (--adapters-mb)."
            )
        async with self._door:  # one after another: each takes the room that it made
            while self.active.bytes + found.n_bytes > self.active.budget:
                old = self.active.oldest(found.n_bytes, self._pins)
                if old is None:
                    self._unpinned.clear()
                    await self._unpinned.wait()
                    continue
                self.active.pop(old)
                self.active.evictions += 1
                self._engine.begin_unload(old)
            self.active.bytes += found.n_bytes
        try:  # the next ones are read and checked while this one waits for the end of a step
            loading = await self._aside(lambda: self._engine.begin_load(card.id, found.adapter))
            await asyncio.shield(asyncio.wrap_future(loading))
        finally:
            self.active.bytes -= found.n_bytes
        self.active.put(card.id, found)
        return found

    def _unpin(self, key: str) -> None:
        self._pins[key] -= 1
        if self._pins[key] <= 0:
            del self._pins[key]
            self._unpinned.set()

    async def _aside(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: and_end_threads(work))


def as_loaded(adapter: Adapter, words: Words) -> Loaded:
    """An adapter with its words and bytes."""
    return Loaded(adapter, words, sum(t.numel() * t.element_size() for t in adapter.tensors().values()))
