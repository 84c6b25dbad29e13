"""From the engine's thread to the event loop: one wake-up for all the outputs of a step."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from functools import partial

from deltaw.serve.types import Output

Submit = Callable[[Callable[[Output], None]], Callable[[], object]]


class Bridge:
    """Carries outputs to the loop that it was made on."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Generation, int, Output, float]] = deque()
        self._is_called = False

    def push(self, to: Generation, index: int, output: Output) -> None:
        """Called in the engine's thread."""
        self._waiting.append((to, index, output, time.perf_counter()))
        if not self._is_called:
            self._is_called = True
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_called = False  # before looking: what comes from now on calls again
        while self._waiting:
            to, index, output, at_s = self._waiting.popleft()
            to.take(index, output, at_s)


class Generation:
    """The sequences of one HTTP request while the engine makes them.

    on_end   called once on the loop when the engine has ended them all, also when nobody listens any more
    streams  whether `outputs` gives each token as it comes, or all at their ends

    After the end: `n_tokens`, `first_s` and `last_s` (perf_counter of the first and the last token), `gaps_s`.
    """

    def __init__(self, bridge: Bridge, on_end: Callable[[Generation], None], *, streams: bool = False) -> None:
        self._bridge, self._on_end = bridge, on_end
        self._events: deque[tuple[int, Output]] = deque()
        self._streams = streams
        self._news = asyncio.Event()
        self._cancels: list[Callable[[], object]] = []
        self._left = self.n_sequences = 0
        self._is_open = True
        self._is_cancelled = False
        self._last_of: dict[int, float] = {}
        self.began_s = time.perf_counter()
        self.first_s: float | None = None
        self.last_s: float | None = None
        self.gaps_s: list[float] = []
        self.n_tokens = 0

    async def start(self, index: int, submit: Submit, *, aside: bool = False) -> None:
        """Begin sequence `index`: `submit(on_output)` returns what cancels it. Raises what submit raises.

        aside  submit in a thread: it takes its time
        """
        self._left += 1
        put = partial(submit, lambda output: self._bridge.push(self, index, output))
        try:
            cancel = await asyncio.to_thread(put) if aside else put()
        except BaseException:
            self._left -= 1
            raise
        self.n_sequences += 1
        self._cancels.append(cancel)
        if self._is_cancelled:
            cancel()

    def started(self) -> None:
        """No more sequences begin."""
        self._is_open = False
        self._end_if_done()

    def take(self, index: int, output: Output, at_s: float) -> None:
        """One output, on the loop."""
        if output.token is not None:
            self.n_tokens += 1
            self.first_s = at_s if self.first_s is None else self.first_s
            if index in self._last_of:
                self.gaps_s.append(at_s - self._last_of[index])
            self._last_of[index] = self.last_s = at_s
        self._events.append((index, output))
        if output.finished is not None:
            self._left -= 1
            self._end_if_done()
        if self._streams or output.finished is not None:
            self._news.set()

    def _end_if_done(self) -> None:
        if self._left == 0 and not self._is_open:
            self._is_open = True  # once
            self._cancels.clear()
            self._on_end(self)

    def cancel(self) -> None:
        """Nobody waits any more: the engine frees what it holds at its next step."""
        if not self._is_cancelled:
            self._is_cancelled = True
            for cancel in self._cancels:
                cancel()

    async def outputs(self) -> AsyncIterator[list[tuple[int, Output]]]:
        """All that came since the last time, until every sequence has ended."""
        ended = 0
        while ended < self.n_sequences:
            await self._news.wait()
            self._news.clear()
            batch = list(self._events)
            self._events.clear()
            ended += sum(output.finished is not None for _, output in batch)
            yield batch
