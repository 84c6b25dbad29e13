"""What is computed before it is asked for: only while nobody asks, and the same as when it is asked for."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

from lab_bench import Bench

from deltaw.errors import TargetError
from deltaw.lab import ahead
from deltaw.lab.ahead import QUIET_S, Ahead, jobs_of
from deltaw.lab.base import Lab
from deltaw.lab.controls import read


def live(ahead: Ahead, inside: Callable[[], object]) -> None:
    """The life of an application, inside which something happens."""

    async def life() -> None:
        async with ahead.beside(None):
            await asyncio.to_thread(inside)

    asyncio.run(life())


def test_lab_ahead_jobs_wait_while_a_request_is_answered_and_end_with_the_lab():
    done: list[int] = []
    second = threading.Event()

    def jobs() -> Iterator[Callable[[], object]]:
        yield lambda: done.append(1)
        yield lambda: (done.append(2), second.set())
        yield lambda: done.append(3) or threading.Event().wait(0.01)

    ahead = Ahead(jobs)

    def inside() -> None:
        with ahead.asked():
            assert not second.wait(2 * QUIET_S)
            assert done == []
        assert second.wait(30)

    live(ahead, inside)
    assert done[:2] == [1, 2]
    assert "ahead" not in {thread.name for thread in threading.enumerate()}


def test_lab_ahead_the_first_jobs_are_done_before_the_lab_answers(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ahead, "monotonic", lambda: now[0])
    done: list[int] = []

    def job(number: int) -> None:
        done.append(number)
        now[0] += 0.4

    early = Ahead(lambda: (partial(job, n) for n in range(4)), first_s=0.5)

    def inside() -> None:
        with early.asked():
            assert done == [0, 1]

    live(early, inside)


def test_lab_ahead_goes_on_after_what_a_base_cannot_have():
    done = threading.Event()

    def refused() -> None:
        raise TargetError("nothing to train")

    live(Ahead(lambda: iter([refused, done.set])), lambda: done.wait(30))
    assert done.is_set()


def test_lab_ahead_garbage_is_collected_when_nobody_asks(monkeypatch):
    class Knot:
        def __init__(self) -> None:
            self.me = self

    before = gc.get_threshold()
    gc.collect()
    gc.set_threshold(10**9, 20, 20)
    try:
        frozen = threading.Event()
        collected = Ahead(lambda: iter(()))
        monkeypatch.setattr(gc, "freeze", frozen.set)

        def inside() -> None:
            assert frozen.wait(30)
            with collected.asked():
                knot = Knot()
                left = weakref.ref(knot)
                del knot
                kept = [[] for _ in range(ahead.GARBAGE + 1)]
                time.sleep(2 * QUIET_S)
                assert left() is not None
            for _ in range(200):
                if left() is None:
                    break
                time.sleep(QUIET_S / 5)
            assert left() is None
            assert len(kept) > ahead.GARBAGE

        live(collected, inside)
    finally:
        gc.set_threshold(*before)


def test_lab_ahead_what_was_made_is_what_a_picture_says(tiny: Bench, tiny_folder: object):
    other = Bench(Lab(str(tiny_folder)))
    for job in jobs_of(other.lab, other.pictures):
        job()
        if other.lab.planned.traces:  # the counts of methods, and then plans, the base's own first
            break
    kept = [key for key in other.lab._kept if isinstance(key, tuple) and key[0] == "counted"]
    assert len(kept) == 7
    assert {key[0].name for key in other.lab.planned.traces} == {str(tiny_folder)}
    assert other.lab.kept("inputs") is not None
    assert other(12, dora=True, bitfit=True) == tiny(12, dora=True, bitfit=True)


def test_lab_ahead_maps_of_picture_6_are_decomposed_the_one_it_opens_with_first(tiny_folder, monkeypatch):
    other = Bench(Lab(str(tiny_folder)))
    lab, picture = other.lab, other.pictures[6]
    shown = read(picture.controls, {})
    jobs = list(ahead._decompositions(lab, picture))
    for job in jobs:
        job()
    made = [job.args for job in jobs]
    assert made[: lab.layers] == [(shown.layer, shown.target), *((n, shown.target) for n in (0,))]
    assert {layer for layer, _ in made[lab.layers : lab.layers + len(lab.roles) - 1]} == {shown.layer}
    assert set(made) == set(lab.linear) == set(lab._directions)
    monkeypatch.setattr(ahead, "KEPT_BYTES", 4 * lab._directions[made[0]].nbytes)
    assert [job.args for job in ahead._decompositions(lab, picture)] == made[:3]
    monkeypatch.setattr(ahead, "LARGEST", 1)
    assert list(ahead._decompositions(lab, picture)) == []
