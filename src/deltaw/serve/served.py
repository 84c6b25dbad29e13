"""What a server serves: the base, adapters given by path, and everything in a registry, under their names."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, DeltawError, NotFound, RegistryError, ServeError, near
from deltaw.model.identity import compare
from deltaw.model.model import Model
from deltaw.ops.native.library import and_end_threads
from deltaw.serve.keys import Key
from deltaw.serve.residency import Card, Lease, Loaded, Residency, as_loaded
from deltaw.serve.words import Words, own_template
from deltaw.store.peft import CONFIG, TENSORS, adapter_folder, read_adapter
from deltaw.store.references import check_name, parse_reference

if TYPE_CHECKING:
    from deltaw.serve.engine import Engine
    from deltaw.store.registry import Registry

MODEL_OWNER = "deltaw"


class Served:
    """Names, and what they mean at this moment.

    base_name     of the base; it hides adapters of that name
    registry      its labels are looked up anew for every request: a promotion counts from the next one on
    roots         folders from which adapters may be added while the server runs
    host_bytes, active_bytes   for adapters in memory, and in the engine
    """

    def __init__(
        self,
        model: Model,
        engine: Engine,
        base_name: str,
        registry: Registry | None = None,
        roots: Sequence[Path] = (),
        host_bytes: int = 2**30,
        active_bytes: int = 2**30,
    ) -> None:
        if model.kind != "causal" or model.tokenizer is None:
            raise ServeError("A served base is a causal language model with its tokenizer; this one is not.")
        self.model, self.engine, self.base_name, self.registry = model, engine, base_name, registry
        n_vocab = int(model.net.get_input_embeddings().weight.shape[0])
        self.words = Words(model.tokenizer, n_vocab)
        self.began = int(time.time())
        self.roots = tuple(Path(root).resolve() for root in roots)
        self._budgets = host_bytes, active_bytes
        self._residency: Residency | None = None
        self._given: dict[str, Card] = {}  # replaced whole, so that the loop may walk it
        self._giving = threading.Lock()
        self._threads = ThreadPoolExecutor(2, "deltaw-names")

    @property
    def context_tokens(self) -> int | None:
        """Positions that the base has learned, for prompt and answer together; None: it does not say."""
        found = getattr(self.model.net.config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) else None

    @property
    def residency(self) -> Residency:
        """Made on first use, on the event loop."""
        if self._residency is None:
            self._residency = Residency(self.engine, *self._budgets)
        return self._residency

    def close(self) -> None:
        """End the threads; the engine is not closed."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._residency is not None:
            self._residency.close()

    # Names --------------------------------------------------------------------------------------

    def give(self, name: str, path: str | Path, *, replace: bool = False) -> Card:
        """Serve the adapter in a folder under `name`. It is read and checked now.

        Raises ServeError for a name that cannot be one or is taken, AdapterError, BaseMismatch, NotFound.
        """
        try:
            check_name(name)
        except RegistryError as problem:
            raise ServeError(str(problem)) from None
        with self._giving:  # two requests for one name come one after another
            return self._give(name, Path(path), replace=replace)

    def _give(self, name: str, path: Path, *, replace: bool) -> Card:
        if name == self.base_name or (name in self._given and not replace):
            what = "the base" if name == self.base_name else "an adapter"
            raise ServeError(f"{name!r} is {what} that is served already. Choose another name, or unload it first.")
        if self.registry is not None and self._is_registered(name):
            raise ServeError(f"The registry has an adapter called {name!r}: promote a version there instead.")
        folder = adapter_folder(path)
        found = self._checked(read_adapter(folder))
        card = Card(name, None, found.id, partial(self.read, folder, found.id), (), found.spec.name, int(time.time()))
        self._given = {**self._given, name: card}
        return card

    @property
    def hides(self) -> bool:
        """Whether the registry has an adapter of the base's name, which nobody can ask for."""
        return self.registry is not None and any(row["name"] == self.base_name for row in self.registry.listing())

    def _is_registered(self, name: str) -> bool:
        assert self.registry is not None
        try:
            self.registry.show(name)
        except NotFound:
            return False
        return True

    async def give_by_request(self, name: str, path: str, *, replace: bool = False) -> Card:
        """`give` for a path that a request names: it must lie under one of `roots` or in the registry."""
        before = self._given.get(name)
        card: Card = await self._aside(lambda: self.give(name, self._jailed(path), replace=replace))
        if before is not None and before.id != card.id:
            await self._drop(before.id)
        return card

    async def take_back(self, name: str) -> None:
        """Serve an adapter that was given no longer; its running requests end. Raises NotFound, ServeError."""
        if name not in self._given:
            if self.registry is not None and await self._aside(lambda: self._is_registered(name)):
                raise ServeError(f"{name!r} is the registry's: remove it there (deltaw adapters).")
            raise NotFound(f"No adapter called {name!r} was loaded.{near(name, self._given)}")
        gone = self._given[name]
        self._given = {other: card for other, card in self._given.items() if other != name}
        await self._drop(gone.id)

    async def _drop(self, key: str) -> None:
        if all(card.id != key for card in self._given.values()):
            await self.residency.drop(key)

    def _jailed(self, path: str) -> Path:
        """The folder that a request's path means. Raises NotFound unless it and its files lie where they may."""
        refusal = NotFound(f"No adapter at {path!r} under the folders that this server may load from.")
        roots = [*self.roots, *([self.registry.root.resolve() / "objects"] if self.registry is not None else [])]
        for root in roots:
            try:
                asked = (root / path).resolve(strict=True)
                if not asked.is_relative_to(root):
                    continue
                folder = adapter_folder(asked)
                real = [folder.resolve(strict=True), *(p.resolve(strict=True) for p in folder.iterdir())]
            except (OSError, ValueError, RuntimeError, DeltawError):  # not there, a loop, a NUL byte, no adapter
                continue
            if (
                all(p.is_relative_to(root) for p in real)
                and (folder / TENSORS).is_file()
                and (folder / CONFIG).is_file()
            ):
                return folder
        raise refusal

    async def resolve(self, asked: str, key: Key | None = None) -> Card:
        """What `asked` means at this moment; the base has no id. Raises NotFound, also for what `key` may not use."""
        card = await self._find(asked)
        if card is None or (key is not None and not key.allows(card.name)):
            raise NotFound(f"The model {asked[:256]!r} does not exist here, or this key may not use it.")
        return card

    async def _find(self, asked: str) -> Card | None:
        if asked in ("", self.base_name):
            return Card(self.base_name, added=self.began)
        if asked in self._given:
            return self._given[asked]
        if self.registry is None:
            return None
        try:
            reference = parse_reference(asked)
            if reference.prefix is not None or reference.name == self.base_name or reference.name in self._given:
                return None  # an id says no name that a key could be asked for
            found = await self._aside(partial(self.registry.resolve, asked))
        except (RegistryError, NotFound):
            return None
        read = partial(self._read_registered, str(found))
        return Card(found.name, found.version, found.id, read)

    async def cards(self, key: Key | None = None) -> list[dict[str, Any]]:
        """The models of /v1/models that `key` may use: the base, given adapters, the registry's that fit the base."""
        rows = [] if self.registry is None else await self._aside(self._listed)
        cards = [Card(self.base_name, added=self.began), *self._given.values(), *rows]
        hidden = {self.base_name, *self._given}
        shown = [c for i, c in enumerate(cards) if i <= len(self._given) or c.name not in hidden]
        return [self.describe(card) for card in shown if key is None or key.allows(card.name)]

    def _listed(self) -> list[Card]:
        assert self.registry is not None
        return [
            Card(row["name"], row["labels"]["current"], row["id"], None, tuple(sorted(row["labels"])), row["method"])
            for row in self.registry.listing(self.model.fingerprint)
            if row["id"] is not None and row.get("fits") != "no"
        ]

    def describe(self, card: Card) -> dict[str, Any]:
        """A model as OpenAI's clients read it, with parent, root, version and fingerprint."""
        own = self.model.fingerprint
        told = {"id": card.name, "object": "model", "created": card.added or self.began, "owned_by": MODEL_OWNER}
        if not card.id:
            whole = own.weights if own is not None else None
            return {**told, "root": card.name, "parent": None, "version": None, "fingerprint": whole}
        more = {"root": str(card), "parent": self.base_name, "version": card.version, "fingerprint": card.id}
        return {**told, **more, "labels": list(card.labels), "method": card.method}

    # Adapters ------------------------------------------------------------------------------------

    async def lease(self, card: Card) -> Lease | None:
        """`card`'s adapter in the engine while the lease lasts; None for the base. Raises DeltawError."""
        return await self.residency.lease(card) if card.id else None

    async def words_of(self, card: Card) -> Words:
        """The tokenizer and template that `card` speaks with. Raises DeltawError."""
        return await self.residency.words(card) if card.id else self.words

    def _checked(self, adapter: Adapter) -> Adapter:
        compare(adapter.fingerprint, self.model.fingerprint, False)
        return adapter

    def _read_registered(self, reference: str) -> Loaded:
        assert self.registry is not None
        return self.read(self.registry.folder(reference))  # which checked every byte; a number is never given again

    def read(self, folder: Path, wanted: str | None = None) -> Loaded:
        """The adapter in a folder with its words, for a `Card`. Raises AdapterError, BaseMismatch.

        wanted  the id that it must have
        """
        adapter = self._checked(read_adapter(folder))
        if wanted is not None and adapter.id != wanted:
            raise AdapterError(f"The adapter in {folder} was changed since it was loaded: load it again.")
        return as_loaded(adapter, self.words.of_adapter(tuple(adapter.spec.new_tokens), own_template(folder)))

    async def _aside(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: and_end_threads(work))
