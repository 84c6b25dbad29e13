"""What pictures need first, computed before it is asked for: first positions, methods, directions of every map.

The first second of jobs is done before the lab answers at all. Then one thread does one small job after the other,
and none while a request is answered or was a moment ago. What takes long is made without the lab's lock, and only then
kept. Garbage is collected at such moments too: within a request it takes up to 30 ms.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import islice
from threading import Event, Thread
from time import monotonic
from typing import Any

from deltaw.errors import DeltawError
from deltaw.lab import counts
from deltaw.lab.base import KEPT_BYTES, Lab
from deltaw.lab.blocks import SHOWN, keep_counted
from deltaw.lab.controls import drawn, read
from deltaw.lab.lowrank import noise_values
from deltaw.lab.picture import Picture
from deltaw.ops.native.library import and_end_threads
from deltaw.plan.network import find_config
from deltaw.plan.short import shortened
from deltaw.train.optim.dynamic import dynamic_map

QUIET_S = 0.25
"""How long nobody has asked before a job begins."""
FIRST_S = 1.0
"""How long jobs are done before the lab answers: they are what its first requests would wait for."""
LARGEST = 1 << 20
"""Values of a matrix that is decomposed ahead: some 50 ms, at most a few megabytes."""
GARBAGE = 10_000
"""Objects made since the last collection that are worth one when nobody asks."""
Job = Callable[[], object]


class Ahead:
    """Runs jobs for `first_s` before a server answers, and the others beside it. It ends with the one that runs."""

    def __init__(self, jobs: Callable[[], Iterator[Job]], first_s: float = 0.0) -> None:
        self._jobs = jobs
        self._first_s = first_s
        self._left: Iterator[Job] = iter(())
        self._end = Event()
        self._asking, self._last = 0, 0.0
        self._thread = Thread(target=self._run, name="ahead", daemon=True)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """A request is answered inside. For one thread, the server's."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1
            self._last = monotonic()

    @asynccontextmanager
    async def beside(self, _: Any) -> Any:
        """The life of an application: jobs run inside."""
        jobs, end = self._jobs(), monotonic() + self._first_s
        while monotonic() < end and (job := next(jobs, None)) is not None:
            _do(job)
        self._left = jobs
        self._last = monotonic()
        self._thread.start()
        yield
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        for job in self._left:
            if not self._quiet():
                return
            _do(job)
        if self._quiet():
            gc.collect()
            gc.freeze()  # what was made stays: a collection need not look at it again
        while self._quiet():
            collect()
            self._end.wait(QUIET_S)

    def _quiet(self) -> bool:
        """Waits until nobody has asked for a moment. False: the lab ends."""
        while self._asking or monotonic() - self._last < QUIET_S:
            if self._end.wait(QUIET_S / 5):
                return False
        return not self._end.is_set()


def _do(job: Job) -> None:
    with suppress(DeltawError):  # what cannot be had here is told to whoever asks for it
        and_end_threads(job)  # else they count beside those of a request, which then sleep at every barrier


def collect() -> None:
    """Collect garbage where there may be much, as Python itself would do in the middle of a plan."""
    young, middle, old = gc.get_count()
    every = gc.get_threshold()
    if young > GARBAGE:
        gc.collect(2 if old > every[2] else 1 if middle > every[1] else 0)


def jobs_of(lab: Lab, pictures: dict[int, Picture]) -> Iterator[Job]:
    """What is worth having before it is asked for, the likeliest first."""
    yield from (partial(_shown, lab, pictures[number]) for number in (6, 9))
    for shape in sorted({(s.out_features, s.in_features) for s in lab.linear.values()}):
        yield partial(noise_values, lab, *shape)
    yield lab.inputs
    for key in SHOWN:
        yield partial(keep_counted, lab, key)
    matrices = _decompositions(lab, pictures[6])
    yield from islice(matrices, lab.layers + len(lab.roles) - 1)  # where one control of picture 6 leads
    yield from (partial(dynamic_map, signed) for signed in (True, False))  # of plans with optimizer states in 8 bits
    likely = next(c["recorded"] for c in drawn(pictures[11].controls) if c["name"] == "model")
    for name in dict.fromkeys((*likely, *lab.sizes)):
        yield partial(shortened, find_config(lab.path(name))[0], None)
        for method in counts.METHODS_OF_11:
            yield partial(counts.planned, lab, read(pictures[11].controls, {"model": name}), method)
    yield from matrices


def _shown(lab: Lab, picture: Picture) -> None:
    with lab.lock:
        picture.compute(lab, read(picture.controls, {}))


def _decompositions(lab: Lab, picture: Picture) -> Iterator[Job]:
    """Of what picture 6 can be moved to: its map in every block, then every map, from the block that it opens with on.

    A quarter of the place for them is left for what is asked for.
    """
    shown: Any = read(picture.controls, {})
    near = sorted(range(lab.layers), key=lambda layer: abs(layer - shown.layer))
    maps = [(layer, shown.target) for layer in near]
    maps += [(layer, role) for layer in near for role in lab.roles if role != shown.target]
    left = 3 * KEPT_BYTES // 4
    for key in maps:
        site = lab.linear.get(key)
        if site is not None and site.out_features * site.in_features <= LARGEST:
            side = min(site.out_features, site.in_features)
            left -= 4 * side * side + 8 * side
            if left < 0:
                return
            yield partial(lab.directions, *key)
