"""Find, check and load the compiled library; say which path runs; force another for tests and benches."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

from deltaw.errors import BadInput
from deltaw.ops.native.build import LIBRARY, sources_hash

T = TypeVar("T")

REFERENCE = "reference"
_ALL = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")  # as dispatch.cpp numbers them
_AGAIN = "Reinstall deltaw (pip install -e . in a checkout) or run: python -m deltaw.ops.native.build"


class SlowPath(UserWarning):
    """The compiled library is missing or stale, so the PyTorch reference runs in its place: right, but slower."""


@dataclass(frozen=True)
class Native:
    """The loaded library, the numbers of its paths that this CPU can run, slowest first, and the last of them."""

    handle: ctypes.CDLL
    numbers: dict[str, int]
    best: int


@dataclass
class _Choice:
    forced: str | None = None


_choice = _Choice()


def open_library(path: Path = LIBRARY) -> tuple[Native | None, str]:
    """The library at `path`, or None and why not: missing, made from other sources, or not loadable."""
    if not path.is_file():
        return None, f"deltaw runs its reference ops: no compiled library (no C++ compiler at install?). {_AGAIN}"
    try:
        handle = ctypes.CDLL(str(path))
        handle.deltaw_sources.restype = handle.deltaw_path.restype = ctypes.c_char_p
        handle.deltaw_wide_room.restype = ctypes.c_int64
        found = (handle.deltaw_sources() or b"").decode().removeprefix("deltaw-sources:")
    except (OSError, AttributeError) as problem:
        return None, f"deltaw runs its reference ops: {path.name} does not load ({problem}). {_AGAIN}"
    if found != sources_hash():
        return None, f"deltaw runs its reference ops: {path.name} was made from other sources. {_AGAIN}"
    handle.deltaw_threads_from.argtypes = [ctypes.c_void_p]
    handle.deltaw_threads_from(torch_parallel())
    names = [(handle.deltaw_path(at) or b"").decode() for at in range(len(_ALL))]
    numbers = {name: at for at, name in enumerate(names) if name}
    return Native(handle, numbers, max(numbers.values())), ""


def _torchs_library() -> ctypes.CDLL:
    """What torch computes with, and through it what that depends on."""
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


def torch_parallel() -> int | None:
    """The address of GOMP_parallel in the OpenMP library that torch itself uses; None where there is none.

    It is looked up among libtorch_cpu's own dependencies, so it is torch's pool whatever its file is called, and
    whoever else has loaded an OpenMP library.
    """
    try:
        return ctypes.cast(_torchs_library().GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None  # another system, or a torch with its own threads: one thread runs


def end_threads() -> None:
    """End the OpenMP threads that wait for work of the calling thread; they come again when it has some.

    GNU OpenMP counts the threads of all who ever asked for some. While there are more than processors, each of them
    sleeps after a few microseconds without work, and a step of hundreds of small stages wakes them each time.
    Where OpenMP is another or older, nothing is done.
    """
    try:
        openmp = _torchs_library()
        openmp.omp_pause_resource(1, openmp.omp_get_initial_device())  # 1: soft, what they know is kept
    except (OSError, AttributeError):
        pass


def in_one_thread(work: Callable[[], T]) -> T:
    """What `work` gives, computed by the calling thread alone; other threads' work is as it was.

    For what has many barriers, where another process may have a processor: a team waits at each for its slowest.
    A thread that has called torch.set_num_threads keeps that number for MKL.
    """
    before = torch.get_num_threads()  # the first to ask in a thread sets it
    try:
        set_threads = _torchs_library().omp_set_num_threads
    except (OSError, AttributeError):
        return work()
    set_threads(1)
    try:
        return work()
    finally:
        set_threads(before)


def and_end_threads(work: Callable[[], T]) -> T:
    """What `work` gives, once the OpenMP threads that it called for have ended."""
    try:
        return work()
    finally:
        end_threads()


@cache
def loaded() -> Native | None:
    """The library beside the sources, opened once; a SlowPath warning, once, if it cannot be used."""
    native, problem = open_library()
    if native is None:
        warnings.warn(problem, SlowPath, stacklevel=2)
    return native


def available() -> bool:
    """Whether compiled kernels can run here."""
    return loaded() is not None


def paths() -> tuple[str, ...]:
    """The paths that this machine can run, slowest first; "reference" is always the first."""
    native = loaded()
    return (REFERENCE, *native.numbers) if native else (REFERENCE,)


def path() -> str:
    """The path that runs now: "amx", "avx512_bf16", "avx512", "avx2", "scalar" or "reference"."""
    return _choice.forced or paths()[-1]


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Run `name`, one of `paths()`, inside the block: for tests and benches; holds for every thread.

    Raises BadInput for a path that this machine cannot run.
    """
    if name not in paths():
        raise BadInput(f"there is no path {name!r} here.\n  This machine can run: {', '.join(paths())}.")
    before, _choice.forced = _choice.forced, name
    try:
        yield
    finally:
        _choice.forced = before


def running() -> tuple[ctypes.CDLL, int] | None:
    """The library and the number of the path that runs; None: the reference."""
    native, wanted = loaded(), _choice.forced
    if native is None or wanted == REFERENCE:
        return None
    return native.handle, native.best if wanted is None else native.numbers[wanted]
