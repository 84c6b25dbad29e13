"""Which sequences compute which tokens in the next step, and in which pages.

Every step: each running sequence gets its next token's row, or the next chunk of a prompt; then waiting ones join while
there is room. Where a running sequence needs a page and none is left, the youngest gives its pages back and waits to be
computed again. The oldest can always go on, so every request ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field

import numpy as np
import torch

from deltaw.core.prefix import Prefix
from deltaw.serve.batch import Segment, StepBatch
from deltaw.serve.pages import PAGE_TOKENS, Pages, digest
from deltaw.serve.sampler import Chooser
from deltaw.serve.text import TextStream
from deltaw.serve.types import Output, Request


def pages_of(n_tokens: int) -> int:
    """The pages that n tokens fill or begin."""
    return -(-n_tokens // PAGE_TOKENS)


@dataclass(eq=False)
class Sequence:
    """One request on its way.

    key       the adapter's, as segments name it; content: what its pages' digests begin with
    front     the adapter's virtual tokens, or None
    tokens    ids of virtual tokens (-1, -2, ...), of the prompt and of the answer so far
    n_given   how many of them are not the answer
    computed  how many have their keys and values in pages
    table     pages in order, as far as there are any (`pages`)
    """

    request: Request
    key: str | None
    content: bytes
    front: Prefix | None
    chooser: Chooser
    text: TextStream
    on_output: Callable[[Output], None]
    tokens: list[int] = field(default_factory=list)
    n_given: int = 0
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    published: int = 0  # pages that others can find
    cancelled: bool = False
    met: bool = False  # whether it was admitted before

    def __post_init__(self) -> None:
        n_before = 0 if self.front is None else self.front.n
        self.tokens = [-1 - i for i in range(n_before)] + list(self.request.prompt)
        self.n_given = len(self.tokens)
        self.table = np.zeros(pages_of(self.n_given + self.request.sampling.max_tokens), dtype=np.int32)

    @property
    def missing(self) -> int:
        """Tokens still to compute before the next one can be chosen: at least 1."""
        return len(self.tokens) - self.computed

    @property
    def n_answer(self) -> int:
        return len(self.tokens) - self.n_given

    def digests_of(self, n_pages: int) -> list[bytes]:
        """The digests of the first n pages, which are full."""
        while (i := len(self.digests)) < n_pages:
            before = self.digests[-1] if self.digests else self.content
            self.digests.append(digest(before, self.tokens[i * PAGE_TOKENS : (i + 1) * PAGE_TOKENS]))
        return self.digests[:n_pages]

    def hold(self, pages: Several[int]) -> None:
        """Put pages behind those that it has."""
        self.table[len(self.pages) : len(self.pages) + len(pages)] = pages
        self.pages += pages


class Ticket:
    """A submitted request."""

    def __init__(self, sequence: Sequence, wake: Callable[[], None]) -> None:
        self._sequence = sequence
        self._wake = wake

    def cancel(self) -> None:
        """End the request before the next step, with finished = "cancelled"; nothing if it ended already."""
        self._sequence.cancelled = True
        self._wake()


class Scheduler:
    """The queue, the running sequences in order of admission, and their pages."""

    def __init__(self, pages: Pages, max_sequences: int, chunk_tokens: int) -> None:
        """chunk_tokens  at most so many rows of a step are of prompts; rows of single tokens come on top."""
        self.pages = pages
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.prefix_hits = 0
        self._max_sequences = max_sequences
        self._chunk_tokens = chunk_tokens

    def end(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and free its pages."""
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.pages.release(sequence.pages)
        sequence.pages = []

    def plan(self) -> list[tuple[Sequence, int]]:
        """The next step: (sequence, rows), sorted by adapter. Their pages are there."""
        planned: list[tuple[Sequence, int]] = []
        left = self._chunk_tokens
        at, before = 0, self.preemptions
        while at < len(self.running):  # preemption takes from its end
            sequence = self.running[at]
            n = 1 if sequence.missing == 1 else min(sequence.missing, left)
            if n and self._has_room(sequence, n):
                planned.append((sequence, n))
                left -= n if sequence.missing > 1 else 0
            at += 1
        if self.preemptions > before:  # whoever lost pages in this step does not take them back in it
            left = 0
        while left > 0 and self.waiting and len(self.running) < self._max_sequences and self._admit():
            sequence = self.running[-1]
            planned.append((sequence, min(sequence.missing, left)))
            left -= planned[-1][1]
        return sorted(planned, key=lambda p: p[0].key or "")

    def _has_room(self, sequence: Sequence, n: int) -> bool:
        """Whether the sequence has pages for n more tokens now; the youngest others lose theirs, or it its own."""
        needed = pages_of(sequence.computed + n) - len(sequence.pages)
        while needed > 0:
            if (taken := self.pages.take(needed)) is not None:
                sequence.hold(taken)
                break
            victim = self.running.pop()
            self.pages.release(victim.pages)
            victim.pages, victim.computed = [], 0
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _admit(self) -> bool:
        """Let the first in the queue run, if there are pages for all that it has to compute."""
        sequence = self.waiting[0]
        total = len(sequence.tokens)
        found = self.pages.share(sequence.digests_of((total - 1) // PAGE_TOKENS))  # the last token's row is needed
        taken = self.pages.take(pages_of(total) - len(found))
        if taken is None:
            self.pages.release(found)
            return False
        self.running.append(self.waiting.popleft())
        sequence.hold(found)
        sequence.hold(taken)
        sequence.published = len(found)
        sequence.computed = len(found) * PAGE_TOKENS
        if not sequence.met:
            self.prefix_hits += sequence.computed
        sequence.met = True
        self._write_front(sequence)
        return True

    def _write_front(self, sequence: Sequence) -> None:
        """Put an adapter's own keys and values in front, where they are not in shared pages already."""
        front = sequence.front
        if front is None or front.keys is None or front.values is None or sequence.computed >= front.n:
            return
        places = np.arange(sequence.computed, front.n)
        slots = torch.from_numpy(_slots(sequence, places)).to(front.keys.device)
        for layer in range(len(front.keys)):
            own = slice(sequence.computed, front.n)
            self.pages.write(layer, slots, front.keys[layer, own], front.values[layer, own])
        sequence.computed = front.n

    def computed(self, sequence: Sequence, n: int) -> None:
        """n more tokens of the sequence are in its pages: full pages can be found by others from now on."""
        sequence.computed += n
        full = sequence.computed // PAGE_TOKENS
        if full > sequence.published:
            for page, name in list(zip(sequence.pages, sequence.digests_of(full), strict=False))[sequence.published :]:
                self.pages.publish(page, name)
            sequence.published = full


def _slots(sequence: Sequence, places: np.ndarray) -> np.ndarray:
    """Where the tokens at `places` of the sequence stand among all pages' tokens."""
    of_page: np.ndarray = sequence.table[places // PAGE_TOKENS].astype(np.int64) * PAGE_TOKENS + places % PAGE_TOKENS
    return of_page


def batch_of(planned: Several[tuple[Sequence, int]], device: torch.device) -> tuple[StepBatch, list[Sequence]]:
    """The step, and the sequences whose next token it decides, in the order of its wanted rows."""
    ids: list[int] = []
    places, slots, wanted, wanting = [], [], [], []
    bounds, contexts = [0], []
    rows: list[Segment] = []
    head: list[Segment] = []
    tables = np.zeros((len(planned), max(len(s.pages) for s, _ in planned)), dtype=np.int32)
    for number, (sequence, n) in enumerate(planned):
        start = sequence.computed
        ids += sequence.tokens[start : start + n]
        places.append(np.arange(start, start + n))
        slots.append(_slots(sequence, places[-1]))
        tables[number, : len(sequence.pages)] = sequence.table[: len(sequence.pages)]
        contexts.append(start)
        bounds.append(bounds[-1] + n)
        _grow(rows, n, sequence.key)
        if n == sequence.missing:
            wanted.append(bounds[-1] - 1)
            wanting.append(sequence)
            _grow(head, 1, sequence.key)

    def tensor(numbers: Several[int] | np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(device)

    batch = StepBatch(
        ids=tensor(ids),
        positions=tensor(np.concatenate(places)),
        slots=tensor(np.concatenate(slots)),
        bounds=tensor(bounds),
        contexts=tensor(contexts),
        tables=torch.from_numpy(tables).to(device),
        segments=tuple(rows),
        wanted=tensor(wanted),
        head=tuple(head),
    )
    return batch, wanting


def _grow(segments: list[Segment], n: int, key: str | None) -> None:
    """n more rows of `key`: a longer last segment, or a new one."""
    if segments and segments[-1].key == key:
        last = segments[-1]
        segments[-1] = Segment(last.start, last.stop + n, key)
    else:
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start, start + n, key))
