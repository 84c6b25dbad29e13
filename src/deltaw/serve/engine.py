"""The engine: one base, many adapters, requests that join and leave between steps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, BaseError, DataError, NotFound, SpecError, WorkFailed, near
from deltaw.model.generate import end_tokens
from deltaw.model.limits import max_positions
from deltaw.model.model import Model
from deltaw.model.paged import cache_shapes
from deltaw.model.resident import Resident, settle
from deltaw.ops.native.library import end_threads
from deltaw.serve.fast import make_runner
from deltaw.serve.grammar import Grammars
from deltaw.serve.pages import PAGE_TOKENS, Pages
from deltaw.serve.runner import Runner
from deltaw.serve.sampler import Choice, Chooser, check_sampling, choose
from deltaw.serve.scheduler import Scheduler, Sequence, Ticket, batch_of
from deltaw.serve.text import TextStream
from deltaw.serve.types import Output, Request, Stats
from deltaw.store.peft import read_adapter

_BROKEN = "The logits are NaN or infinite: the adapter or the base is broken."
OnOutput = Callable[[Output], None]


@dataclass(eq=False)
class _Loaded:
    """One version of an adapter under a name. It leaves when the name is not its own any more and nobody uses it."""

    key: str | None
    resident: Resident | None
    users: int = 0
    named: bool = True


def _nothing() -> Future[None]:
    done: Future[None] = Future()
    done.set_result(None)
    return done


class Engine:
    """Serves one base with many adapters.

    It owns the model from now on: nobody else computes with it or attaches to it until `close`. Methods may be called
    from any thread; what a request gives is told in the engine's own thread.

    kv_bytes       bytes of keys and values of all sequences
    max_sequences  at most so many run at once; others wait
    chunk_tokens   at most so many tokens of prompts are computed in one step, beside every running answer's next one
    make_runner    what computes steps: one native call where the base allows it (serve/fast.py), else its own code

    Raises BaseError for a base that cannot be served, AdapterError for one with adapters in it.
    """

    def __init__(
        self,
        model: Model,
        *,
        kv_bytes: int = 1 << 30,
        max_sequences: int = 256,
        chunk_tokens: int = 512,
        make_runner: Callable[[Model, Pages], Runner] = make_runner,
    ) -> None:
        if model.kind != "causal":
            raise BaseError(f"Only models that go on with a text are served; this is {model.kind!r}.")
        if model.adapters:
            raise AdapterError(f"Detach {', '.join(sorted(model.adapters))} first: the engine loads its own adapters.")
        if not model.installed.is_bare:
            raise AdapterError("Another engine serves this model: close it first.")
        if max_sequences < 1 or chunk_tokens < 1:
            raise SpecError("max_sequences and chunk_tokens must be 1 or more.")
        self.model = model
        self.pages = Pages(cache_shapes(model.net), kv_bytes, model.net.dtype, model.device)
        if self.pages.n_pages < 1:
            raise SpecError(f"kv_bytes={kv_bytes} hold no page; one takes {self.pages.page_bytes} bytes.")
        self._scheduler = Scheduler(self.pages, max_sequences, chunk_tokens)
        self._runner = make_runner(model, self.pages)
        self._ends = end_tokens(model)
        self._grammars = Grammars()
        self._base = _Loaded(None, None)
        self._named: dict[str, _Loaded] = {}
        self._of: dict[Sequence, _Loaded] = {}
        self._numbers = 0
        self._tokens_total = 0
        self._lock = threading.Condition()
        self._arrived: deque[Sequence] = deque()
        self._orders: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._closing = self._stopped = False
        self._cancels = False
        self._thread = threading.Thread(target=self._loop, name="deltaw-engine", daemon=True)
        end_threads()
        self._thread.start()

    # Adapters -------------------------------------------------------------------------------------

    def load(self, name: str, adapter: str | Path | Adapter, *, allow_other_base: bool = False) -> None:
        """Serve an adapter under `name`. Where the name exists, new requests get the new one, running ones keep theirs.

        Raises AdapterError for what does not fit (strictly) or cannot share a batch, WorkFailed when closed. Running
        requests wait for the short time of putting it in only, not for the reading.
        """
        self.begin_load(name, adapter, allow_other_base=allow_other_base).result()

    def begin_load(self, name: str, adapter: str | Path | Adapter, *, allow_other_base: bool = False) -> Future[None]:
        """As `load`, which it does not wait for: the adapter is read and checked, and comes in after the next step."""
        if not name:
            raise AdapterError("An adapter needs a name.")
        read = adapter if isinstance(adapter, Adapter) else read_adapter(Path(adapter))
        resident = settle(self.model, read, allow_other_base=allow_other_base)
        ready = self._runner.ready(resident)
        end_threads()
        with self._lock:
            self._numbers += 1
            loaded = _Loaded(f"{name}#{self._numbers}", resident)

        def put_in() -> None:
            self._runner.add(str(loaded.key), resident, ready)
            with self._lock:
                before, self._named[name] = self._named.get(name), loaded
            self._unname(before)

        return self._order(put_in)

    def unload(self, name: str) -> None:
        """Forget an adapter: no new request gets it; it leaves memory when the last running one ends.

        Raises NotFound.
        """
        self.begin_unload(name).result()

    def begin_unload(self, name: str) -> Future[None]:
        """As `unload`, which it does not wait for; what is loaded later comes in after this one has left."""
        with self._lock:
            loaded = self._find(name)
            del self._named[name]
        return self._unname(loaded)

    def names(self) -> list[str]:
        """The adapters that requests can ask for."""
        with self._lock:
            return sorted(self._named)

    def resident(self, name: str | None) -> Resident | None:
        """What the engine holds of an adapter (its `id`, `tokenizer`, `made`); None for the base. Raises NotFound."""
        with self._lock:
            return self._find(name).resident

    def tokenizer(self, name: str | None) -> Any:
        """The tokenizer that an adapter's requests use; the base's for None."""
        resident = self.resident(name)
        return self.model.tokenizer if resident is None else resident.tokenizer

    def _find(self, name: str | None) -> _Loaded:
        if name is None:
            return self._base
        if name not in self._named:
            raise NotFound(f"No adapter {name!r} is loaded.{near(name, self._named)}")
        return self._named[name]

    def _unname(self, loaded: _Loaded | None) -> Future[None]:
        if loaded is not None:
            with self._lock:
                loaded.named = False
                left = loaded.users == 0
            if left:
                return self._order(lambda: self._runner.remove(str(loaded.key)))
        return _nothing()

    def _leave(self, loaded: _Loaded) -> None:
        """One request less uses it."""
        with self._lock:
            loaded.users -= 1
            left = loaded.users == 0 and not loaded.named
        if left:
            self._order(lambda: self._runner.remove(str(loaded.key)))

    # Requests ----------------------------------------------------------------------------------------

    def most_tokens(self, n_prompt: int, adapter: str | None = None) -> int:
        """The largest max_tokens of a request with so long a prompt; 0 or less: no such request can be served."""
        return self._room(n_prompt, self.resident(adapter))

    def _room(self, n_prompt: int, resident: Resident | None) -> int:
        taken = n_prompt + (0 if resident is None else resident.n_before)
        room = self.pages.n_pages * PAGE_TOKENS + 1 - taken  # the last token is not computed
        limit = max_positions(self.model.net)
        if limit is None:  # rotary: what the model was trained for
            limit = getattr(self.model.net.config.get_text_config(), "max_position_embeddings", None)
        return room if limit is None else min(room, limit - taken)

    def submit(self, request: Request, on_output: OnOutput) -> Ticket:
        """Queue a request. on_output is called for each token in the engine's thread, last with `finished`.

        Raises NotFound (adapter), DataError (a prompt that is empty, has unknown tokens, or can never fit), SpecError
        (sampling), WorkFailed (closed).
        """
        check_sampling(request.sampling)
        with self._lock:
            loaded = self._find(request.adapter)
            loaded.users += 1  # pinned
        try:
            sequence = self._sequence(request, loaded, on_output)
            with self._lock:
                if self._closing:
                    raise WorkFailed("The engine is closing: it takes no more requests.")
                self._of[sequence] = loaded
                self._arrived.append(sequence)
                self._lock.notify_all()
        except BaseException:
            self._leave(loaded)
            raise
        return Ticket(sequence, self._wake)

    def _sequence(self, request: Request, loaded: _Loaded, on_output: OnOutput) -> Sequence:
        sampling, resident = request.sampling, loaded.resident
        self._refuse_prompt(request, resident)
        tokenizer = self.model.tokenizer if resident is None else resident.tokenizer
        if sampling.stop and tokenizer is None:
            raise SpecError("Stop strings need a tokenizer; this base has none.")
        matcher = None
        if sampling.json_schema is not None:
            matcher = self._grammars.matcher(tokenizer, self._ends, sampling.json_schema)
        return Sequence(
            request=request,
            key=loaded.key,
            content=b"base" if resident is None else resident.id.encode(),
            front=None if resident is None else resident.front,
            chooser=Chooser(sampling, request.prompt, matcher),
            text=TextStream(tokenizer, request.prompt, sampling.stop),
            on_output=on_output,
        )

    def _refuse_prompt(self, request: Request, resident: Resident | None) -> None:
        most = self._room(len(request.prompt), resident)
        if not request.prompt:
            raise DataError(f"Request {request.id!r} has an empty prompt.")
        if request.sampling.max_tokens > most:
            raise DataError(
                f"Request {request.id!r} has a prompt of {len(request.prompt)} tokens and asks for "
                f"{request.sampling.max_tokens} more; behind that prompt there is room for {max(most, 0)}."
            )
        n_vocab = self.model.net.get_input_embeddings().weight.shape[0]
        new = {int(i) for rows, _ in resident.made.rows.values() for i in rows} if resident is not None else set()
        for token in (*request.prompt, *(token for token, _ in request.sampling.logit_bias)):
            if not (0 <= token < n_vocab or token in new):
                raise DataError(f"Request {request.id!r}: token {token} is not among the {n_vocab} of this base.")

    def stats(self) -> Stats:
        """Numbers of this moment."""
        s = self._scheduler
        used = self.pages.n_used * self.pages.page_bytes
        total = self.pages.n_pages * self.pages.page_bytes
        waiting = len(s.waiting) + len(self._arrived)
        return Stats(len(s.running), waiting, used, total, self._tokens_total, s.preemptions, s.prefix_hits)

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs: a dead one answers nobody."""
        return self._thread.is_alive()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those that are here run for `drain_s` seconds at most, cancel the rest, and stop.

        The model is the base again. May be called twice.
        """
        with self._lock:
            self._closing = True
            until = time.monotonic() + drain_s
            self._lock.wait_for(lambda: not self._of, timeout=max(until - time.monotonic(), 0.0))
            for sequence in self._of:
                sequence.cancelled = True
            self._stopped = True
        self._wake()
        self._thread.join()

    # The engine's thread -------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._lock:
            self._cancels = True
            self._lock.notify_all()

    def _order(self, work: Callable[[], None]) -> Future[None]:
        """Do something between two steps; in the engine's thread now. Orders are done in the order in which they come.

        Raises WorkFailed.
        """
        if threading.current_thread() is self._thread:
            work()
            return _nothing()
        done: Future[None] = Future()
        with self._lock:
            if self._stopped:
                raise WorkFailed("The engine is closed.")
            self._orders.append((work, done))
            self._lock.notify_all()
        return done

    def _loop(self) -> None:
        s = self._scheduler
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._arrived or self._orders or self._cancels or s.running or s.waiting or self._stopped
                )
                if self._stopped and not (self._of or self._orders):
                    break
            try:
                self._step()
            except Exception as error:  # what ran ends with it; the engine goes on
                for sequence in list(s.running) or list(s.waiting)[:1]:
                    self._end(sequence, Output(None, "", finished="error", error=f"{type(error).__name__}: {error}"))
        for loaded in {id(v): v for v in self._named.values()}.values():
            self._runner.remove(str(loaded.key))
        self._named.clear()

    def _step(self) -> None:
        """Orders, arrivals and cancels; then one forward and a token for every sequence that has its logits."""
        s = self._scheduler
        self._between()
        if not (planned := s.plan()):
            return
        batch, wanting = batch_of(planned, self.model.device)
        logits = self._runner.run(batch)
        choices = choose(logits, [w.chooser for w in wanting]) if wanting else []
        for sequence, n in planned:
            s.computed(sequence, n)
        for sequence, choice in zip(wanting, choices, strict=True):
            self._took(sequence, choice)

    def _between(self) -> None:
        with self._lock:
            orders, self._orders = list(self._orders), deque()
            self._scheduler.waiting.extend(self._arrived)
            self._arrived.clear()
            cancels, self._cancels = self._cancels, False
        for work, done in orders:
            try:
                work()
                done.set_result(None)
            except BaseException as error:
                done.set_exception(error)
        if cancels:
            for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
                if sequence.cancelled:
                    self._end(sequence, Output(None, sequence.text.end(), finished="cancelled"))

    def _took(self, sequence: Sequence, choice: Choice | None) -> None:
        """A sequence's next token is chosen: tell it, and end the sequence where it ends."""
        sampling, chooser = sequence.request.sampling, sequence.chooser
        if choice is None:
            self._end(sequence, Output(None, "", finished="error", error=chooser.problem or _BROKEN))
            return
        token = choice.token
        ends = token in self._ends and not (sampling.ignore_eos and chooser.matcher is None)
        if ends or token in sampling.stop_token_ids:
            self._end(sequence, Output(None, sequence.text.end(), finished="stop"))
            return
        sequence.tokens.append(token)
        self._tokens_total += 1
        chooser.took(token)
        if chooser.problem is not None:
            self._end(sequence, Output(None, "", finished="error", error=chooser.problem))
            return
        text, stopped = sequence.text.push(token)
        finished = "stop" if stopped or (chooser.matcher is not None and chooser.matcher.done) else None
        if finished is None and sequence.n_answer >= sampling.max_tokens:
            finished = "length"
        if finished is not None and not stopped:
            text += sequence.text.end()
        output = Output(token, text, choice.logprob, choice.top, finished)
        if finished is None:
            self._tell(sequence, output)
        else:
            self._end(sequence, output)

    def _tell(self, sequence: Sequence, output: Output) -> None:
        try:
            sequence.on_output(output)
        except Exception:  # whoever listens is gone: the others' answers matter more
            sequence.cancelled = self._cancels = True

    def _end(self, sequence: Sequence, output: Output) -> None:
        self._scheduler.end(sequence)
        self._leave(self._of[sequence])
        self._tell(sequence, output)
        with self._lock:
            del self._of[sequence]
            self._lock.notify_all()
