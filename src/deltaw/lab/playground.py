"""The playground: one prompt, answered by the base and by several adapters, together in the steps of one engine.

It is the engine of `deltaw serve` on a second copy of the base's network. The pictures train and attach on theirs, and
the engine wants a model that nobody else computes with; weights that are pages of the same files are in memory once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from deltaw.errors import BadInput, DeltawError, NotFound, WorkFailed, near
from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk
from deltaw.lab.shelf import find_run, open_registry
from deltaw.model.base import load_base
from deltaw.serve.bridge import Bridge, Generation
from deltaw.serve.engine import Engine
from deltaw.serve.residency import Card, Lease
from deltaw.serve.served import Served
from deltaw.serve.types import Output, Request, Sampling
from deltaw.serve.words import Words
from deltaw.store.peft import adapter_folder, read_adapter

KV_BYTES = 2**28
ADAPTER_BYTES = 2**29
"""For adapters in the engine, and as much for those that wait in memory; the least recently used leave first."""
MOST_COLUMNS = 6
Told = dict[str, Any]
"""One event, as plain data."""


@dataclass(frozen=True)
class Asked:
    """One prompt and who answers it.

    adapters  "base", "registry:NAME[@VERSION or @LABEL]", "run:NAME" or "given:NAME"
    chat      the prompt is a user's turn, written by each one's chat template; else the text itself
    """

    prompt: str
    adapters: tuple[str, ...]
    max_tokens: int
    temperature: float
    seed: int
    chat: bool


@dataclass
class Column:
    """One answer on its way; `problem`: why there is none."""

    asked: str
    name: str = ""
    id: str = ""
    adapter: str | None = None
    prompt: tuple[int, ...] = ()
    problem: str | None = None

    def plain(self) -> Told:
        """What the page says above the answer."""
        return {"asked": self.asked, "name": self.name, "id": self.id, "problem": self.problem,
                "prompt_tokens": len(self.prompt)}  # fmt: skip


@dataclass
class _Turn:
    """What one prompt holds while its answers are made. together: the most sequences that one step had meanwhile."""

    columns: list[Column] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    together: int = 0

    def release(self) -> None:
        """Its adapters may leave the engine."""
        while self.leases:
            self.leases.pop().release()


class Playground:
    """Answers for any number of pages at once. The base is loaded with the first prompt.

    adapter_bytes  for the adapters in the engine; those of one prompt must fit into it
    """

    def __init__(self, lab: Lab, desk: Desk, adapter_bytes: int = ADAPTER_BYTES) -> None:
        self.lab, self.desk = lab, desk
        self._bytes = adapter_bytes
        self._served: Served | None = None
        self._making = threading.Lock()
        self._bridge: Bridge | None = None
        self._door: asyncio.Lock | None = None
        self._numbers = 0

    def served(self) -> Served:
        """The engine with its adapters, made on first use. Raises BaseError, ServeError."""
        with self._making:
            if self._served is None:
                model = load_base(self.lab.base, dtype=str(self.lab.model.net.dtype), say=self.lab.say)
                engine = Engine(model, kv_bytes=KV_BYTES, max_sequences=64)
                self._served = Served(model, engine, "base", host_bytes=self._bytes, active_bytes=self._bytes)
            return self._served

    def close(self) -> None:
        """End running answers and the engine's thread."""
        with self._making:
            if self._served is not None:
                self._served.engine.close()
                self._served.close()
                self._served = None

    # Who answers ------------------------------------------------------------------------------------

    def card(self, asked: str) -> Card:
        """What `asked` means now: a label moves, a run trains on. Raises NotFound, BadInput, AdapterError."""
        if asked == "base":
            return Card("base")
        kind, _, name = asked.partition(":")
        if kind == "registry":
            registry = open_registry(self.desk)
            found = registry.resolve(name)
            return Card(
                found.name, found.version, found.id, lambda: self.served().read(registry.folder(str(found)), found.id)
            )
        if kind == "run":
            folder = adapter_folder(find_run(self.desk, name))
        elif kind == "given":
            folder = self._given(name)
        else:
            raise BadInput(f"{asked[:80]!r} says no adapter: write base, registry:NAME, run:NAME or given:NAME.")
        adapter_id = read_adapter(folder).id
        return Card(name, None, adapter_id, partial(self.served().read, folder, adapter_id))

    def _given(self, name: str) -> Path:
        if name not in self.lab.given:
            raise NotFound(f"No adapter was given as {name[:80]!r}.{near(name[:80], self.lab.given)}")
        return adapter_folder(self.lab.given[name])

    # Answers ------------------------------------------------------------------------------------------

    async def answer(self, asked: Asked) -> AsyncIterator[Told]:
        """Events of one prompt: "start" with the columns, "token" with text, "end" of a column, "done".

        Who leaves off reading ends the answers at the engine's next step.
        """
        served = await asyncio.to_thread(self.served)
        if self._bridge is None or self._door is None:
            self._bridge, self._door = Bridge(), asyncio.Lock()
        turn = _Turn()
        try:
            async with self._door:  # two prompts that each hold a part of the room would wait for each other
                turn.columns = [await self._column(served, asked, which, turn) for which in asked.adapters]
        except BaseException:
            turn.release()
            raise
        generation = Generation(self._bridge, lambda _: turn.release(), streams=True)
        try:
            yield {"event": "start", "columns": [c.plain() for c in turn.columns]}
            for index, column in enumerate(turn.columns):
                if column.problem is None:
                    await self._submit(served.engine, asked, generation, turn, index)
            generation.started()
            for index, column in enumerate(turn.columns):
                if column.problem is not None:
                    yield _told(index, Output(None, "", finished="error", error=column.problem))
            async for outputs in generation.outputs():
                for index, output in outputs:
                    yield _told(index, output)
            yield {"event": "done", "together": turn.together, "tokens": generation.n_tokens}
        finally:  # also when nobody reads on: the engine ends what runs, then the leases go
            generation.started()
            generation.cancel()

    async def _column(self, served: Served, asked: Asked, which: str, turn: _Turn) -> Column:
        """One column with its adapter in the engine and its prompt in tokens, or with its problem."""
        column = Column(which, which.partition(":")[2] or which)
        try:
            card = await asyncio.to_thread(self.card, which)
            column.name, column.id = str(card), card.id
            words = await served.words_of(card)
            lease = None if not card.id else await self._leased(served, card, turn)
            column.adapter = None if lease is None else lease.key
            column.prompt = tuple(await asyncio.to_thread(_encoded, asked, words))
        except DeltawError as problem:
            column.problem = str(problem)
        return column

    async def _leased(self, served: Served, card: Card, turn: _Turn) -> Lease:
        residency = served.residency
        held = {lease.key for lease in turn.leases} | {card.id}
        tiers = (residency.active.items, residency.host.items)
        size = sum(next((t[key].n_bytes for t in tiers if key in t), 0) for key in held)
        if size > self._bytes:
            raise WorkFailed(
                f"The adapters of this prompt take {size / 2**20:.0f} MB together, and the playground has "
                f"{self._bytes / 2**20:.0f} MB for them: ask fewer at once."
            )
        lease = await served.lease(card)
        assert lease is not None
        turn.leases.append(lease)
        return lease

    async def _submit(self, engine: Engine, asked: Asked, generation: Generation, turn: _Turn, index: int) -> None:
        column = turn.columns[index]
        self._numbers += 1
        sampling = Sampling(max_tokens=asked.max_tokens, temperature=asked.temperature, seed=asked.seed)
        request = Request(f"ask-{self._numbers}", column.prompt, sampling, column.adapter)

        def submit(on_output: Callable[[Output], None]) -> Callable[[], object]:
            def note(output: Output) -> None:  # in the engine's thread
                turn.together = max(turn.together, engine.stats().running)
                on_output(output)

            return engine.submit(request, note).cancel

        try:
            await generation.start(index, submit)
        except DeltawError as problem:
            column.problem = str(problem)


def _encoded(asked: Asked, words: Words) -> list[int]:
    if asked.chat:
        return words.encode_chat([{"role": "user", "content": asked.prompt}])
    return words.encode(asked.prompt)


def _told(index: int, output: Output) -> Told:
    if output.finished is None:
        return {"event": "token", "column": index, "text": output.text}
    return {
        "event": "end", "column": index, "text": output.text, "finished": output.finished, "error": output.error,
    }  # fmt: skip
