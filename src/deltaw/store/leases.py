"""Who is at work in a registry: one lock for what must not overlap, one lease a process for what it uses.

ROOT/.lock                 held for moments: a folder moved in, a version removed, a lease changed, gc
ROOT/leases/LEASE.lock     held while its process lives; the system lets go of it, also after kill -9
ROOT/leases/LEASE.ids      the adapters that this process uses, one id a line
ROOT/aside/LEASE-*         what that process is writing or throwing away
"""

from __future__ import annotations

import atexit
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from deltaw.errors import WorkFailed
from deltaw.store.files import space_explained

WAIT_S = 120
POLL_S = 0.005

_held: dict[tuple[int, Path], Lease] = {}


class Lease:
    """What one process uses of a registry; it ends with the process."""

    def __init__(self, root: Path) -> None:
        self.token = uuid.uuid4().hex
        self._file = root / "leases" / f"{self.token}.ids"
        self._ids: set[str] = set()
        self._lock = FileLock(self._file.with_suffix(".lock"), thread_local=False)  # any thread's call may have made it
        with space_explained("a lease", root):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        self._pid = os.getpid()
        atexit.register(self.end)

    def hold(self, adapter_id: str) -> None:
        """Keep an adapter from gc. Call it under the registry's lock."""
        if adapter_id not in self._ids:
            with self._file.open("a") as file:
                file.write(f"{adapter_id}\n")
            self._ids.add(adapter_id)

    def end(self) -> None:
        """Use nothing any more. At the process's end this happens by itself; a killed process's lease ends too."""
        if self._pid == os.getpid():  # a fork has this object, but not this lease
            self._file.unlink(missing_ok=True)
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)


@contextmanager
def registry_lock(root: Path) -> Iterator[None]:
    """Be the only process that changes files below `root`. Raises WorkFailed after two minutes of waiting."""
    with space_explained("a lock", root):
        lock = FileLock(root / ".lock")
        try:
            lock.acquire(timeout=WAIT_S, poll_interval=POLL_S)
        except Timeout:
            raise WorkFailed(f"The registry {root} was busy for {WAIT_S} s: another process holds .lock.") from None
    try:
        yield
    finally:
        lock.release()


def own_lease(root: Path) -> Lease:
    """This process's lease, made at the first call. Call it under the registry's lock."""
    key = (os.getpid(), root)  # a fork has a lease of its own
    if key not in _held:
        _held[key] = Lease(root)
    return _held[key]


@contextmanager
def aside(root: Path) -> Iterator[Path]:
    """A new folder below `root` to write in, gone at the end; gc clears it when its process was killed."""
    with registry_lock(root):
        token = own_lease(root).token
    folder = root / "aside" / f"{token}-{uuid.uuid4().hex[:8]}"
    with space_explained("an adapter", root):
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def in_use(root: Path) -> tuple[set[str], list[Path]]:
    """(ids that living processes use, what dead ones left aside). Their leases are removed. Call it under the lock."""
    mine = own_lease(root).token
    alive, ids = {mine}, set()
    for lock_file in sorted((root / "leases").glob("*.lock")):
        token = lock_file.stem
        if token != mine and _is_dead(lock_file):
            lock_file.with_suffix(".ids").unlink(missing_ok=True)
            lock_file.unlink(missing_ok=True)
            continue
        alive.add(token)
        listed = lock_file.with_suffix(".ids")
        ids |= set(listed.read_text().split()) if listed.is_file() else set()
    left = [p for p in (root / "aside").glob("*") if p.name.partition("-")[0] not in alive]
    return ids, left


def _is_dead(lock_file: Path) -> bool:
    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True
