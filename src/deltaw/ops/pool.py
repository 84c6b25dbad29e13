"""PyTorch's large buffers on the CPU from a pool that holds no more than what was in use at once (ops/native/pool.cpp).

PyTorch asks the C library for every buffer. glibc keeps them in one heap, where small pieces between them leave holes
that no other buffer fits: a step can hold twice what it uses, by chance; and it returns the largest to the system each
time, to pay page faults for them again. The pool gives buffers of LEAST bytes or more places of whole pages in a region
of its own; a hole there costs addresses and no memory. So what a run takes can be planned to the page.
"""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltaw.ops.native.library import loaded

LEAST = 64 << 10
"""Bytes: smaller buffers are the C library's, as they were."""
PAGE = 4096
_STARTING = threading.Lock()
_TIMES = 4
"""As many addresses as this many times the machine's memory: room between what is in use."""


@dataclass(frozen=True)
class Pooled:
    """Bytes of the pool: `in_use` by buffers, `held` in memory, and the `most` in use at once since the last settle."""

    in_use: int
    held: int
    most: int


def start() -> bool:
    """From now on this process's large buffers lie in the pool, whoever asks PyTorch for them; True where they do.

    Buffers that are there stay where they are. On Linux with glibc and the compiled library; not where the process's
    addresses are limited (ulimit -v).
    """
    native = loaded()
    if native is None:
        return False
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _TIMES
    with _STARTING:
        return bool(native.handle.deltaw_pool_start(b"libc10.so", ctypes.c_int64(size)))


def settle() -> None:
    """Give the memory of all that is free to the system; what counts as the most in use begins anew."""
    native = loaded()
    if native is not None:
        native.handle.deltaw_pool_settle()


def pooled() -> Pooled:
    """What the pool holds now; nothing where it was not started."""
    found = (ctypes.c_int64 * 3)()
    native = loaded()
    if native is not None:
        native.handle.deltaw_pool_bytes(found)
    return Pooled(*found)


def taken(sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The bytes that buffers of these sizes take, in the pool or beside it; below 0 where they are given back."""
    whole = -(-np.abs(sizes) // PAGE) * PAGE * np.sign(sizes)
    found: NDArray[np.int64] = np.where(np.abs(sizes) < LEAST, sizes, whole)
    return found
