"""The pool of PyTorch's buffers: nothing overlaps, nothing is lost, and no more is held than was in use."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from deltaw.ops import pool
from deltaw.ops.pool import LEAST, PAGE, pooled, settle, start, taken

MB = 1 << 20


@pytest.fixture(autouse=True)
def _started() -> None:
    assert start()
    assert start()  # a second call changes nothing


def _bytes(n: int) -> torch.Tensor:
    return torch.empty(n, dtype=torch.uint8)


def test_ops_pool_counts_what_is_in_use_in_pages_and_small_buffers_are_not_its() -> None:
    before = pooled().in_use
    small = _bytes(LEAST - 1)
    assert pooled().in_use == before
    large = _bytes(LEAST + 1)
    assert pooled().in_use == before + LEAST + PAGE
    view = large[10:]
    del large
    assert pooled().in_use == before + LEAST + PAGE  # somebody still sees it
    del view, small
    assert pooled().in_use == before
    sizes = np.array([LEAST - 1, LEAST, LEAST + 1, -LEAST - 1, 1 - LEAST], dtype=np.int64)
    assert taken(sizes).tolist() == [LEAST - 1, LEAST, LEAST + PAGE, -LEAST - PAGE, 1 - LEAST]


def test_ops_pool_buffers_of_many_threads_never_overlap() -> None:
    before = pooled().in_use
    wrong: list[str] = []

    def work(number: int) -> None:
        rng, alive = random.Random(number), []
        for i in range(600):
            if len(alive) > 20 or (alive and rng.random() < 0.4):
                made, value = alive.pop(rng.randrange(len(alive)))
                if not bool((made == value).all()):
                    wrong.append(f"thread {number}, buffer {i}")
            else:
                value = number * 1000 + i
                alive.append((torch.full((rng.randrange(1, 300_000),), value, dtype=torch.int32), value))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert pooled().in_use == before
    assert pooled().most > before


_GROWTH = """
import json, random, torch
from deltaw.ops.pool import pooled, settle, start
from deltaw.plan.memory import resident_bytes
assert start()
torch.ones(1 << 20, dtype=torch.uint8)
settle()
before, worst, found = resident_bytes(), 0, []
rng, alive = random.Random(3), []
for i in range(2000):
    alive.append(torch.ones(rng.randrange(1 << 16, 9 << 20), dtype=torch.uint8))
    while sum(t.numel() for t in alive) > 60 << 20 or (alive and rng.random() < 0.3):
        alive.pop(rng.randrange(len(alive)))
    now = pooled()
    assert now.in_use <= now.held <= now.most + now.most // 32, now
    found.append((resident_bytes() - before - now.held) / (1 << 20))
most = pooled().most
alive.clear()
settle()
left = pooled()
print(json.dumps([max(found), most, left.held, left.most, resident_bytes() - before]))
"""


def test_ops_pool_holds_no_more_than_was_in_use_at_once_and_the_system_agrees() -> None:
    done = subprocess.run([sys.executable, "-c", _GROWTH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    beside, most, held, again, left = json.loads(done.stdout)
    assert most > 55 * MB
    assert beside < 3  # MB: what the process has beside the pool
    assert (held, again) == (0, 0)
    assert left < 3 * MB


def test_ops_pool_settle_keeps_what_is_in_use_as_it_is() -> None:
    kept, gone = torch.arange(MB, dtype=torch.int32), torch.ones(MB, dtype=torch.int32)
    del gone
    settle()
    now = pooled()
    assert now.held == now.in_use == now.most >= 4 * MB
    assert bool((kept == torch.arange(MB, dtype=torch.int32)).all())


def test_ops_pool_a_process_that_forks_can_go_on() -> None:
    script = (
        "import os, threading, torch\n"
        "from deltaw.ops.pool import start\n"
        "torch.set_num_threads(1)\n"  # a child of a process with OpenMP's threads waits for them for ever
        "assert start()\n"
        "kept = torch.ones(1 << 20)\n"
        "stop = threading.Event()\n"
        "def churn():\n"
        "    while not stop.is_set(): torch.empty(1 << 20)\n"
        "thread = threading.Thread(target=churn); thread.start()\n"
        "for _ in range(20):\n"
        "    child = os.fork()\n"
        "    if child == 0: os._exit(0 if float((torch.ones(1 << 18).sum() + kept[-1])) == (1 << 18) + 1 else 3)\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "stop.set(); thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_ops_pool_stays_away_where_addresses_are_limited() -> None:
    code = (
        "import torch; from deltaw.ops.pool import *; print(start(), pooled().most, float(torch.ones(1 << 20).sum()))"
    )
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 60000000; "$0" -c "$1"', sys.executable, code], capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "0", "1048576.0"], done.stderr


def test_ops_pool_more_than_its_addresses_is_the_c_librarys_and_its_refusal_is_pytorchs() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        _bytes(1 << 60)
    assert pool.pooled().in_use >= 0
