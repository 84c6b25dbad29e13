"""Memory of this process as Linux counts it, and the settings of its allocator. Where there is no /proc: None."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress
from pathlib import Path

from deltaw.ops import pool

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def resident_bytes() -> int | None:
    """Resident memory of this process now (VmRSS): anonymous pages, and pages of mapped files that are in memory."""
    return _status("VmRSS")


def file_bytes() -> int | None:
    """The part of `resident_bytes` that are pages of mapped files: libraries, and weights used as the file has them."""
    return _status("RssFile")


def peak_bytes() -> int | None:
    """The most that was resident since the start or the last `forget_peak` (VmHWM); kept by the kernel, so no peak
    is missed."""
    return _status("VmHWM")


def forget_peak() -> bool:
    """Begin anew with `peak_bytes`: True where the system can do it."""
    gc.collect()
    with suppress(OSError):
        _CLEAR.write_text("5")
        return True
    return False


def machine_bytes() -> tuple[int, int] | None:
    """The machine's memory and what of it is free for a new process, in bytes; None where the system does not say.

    A control group's limit (version 2, of a container) counts as the machine's memory.
    """
    if not _MACHINE.is_file():
        return None
    lines = (line.split() for line in _MACHINE.read_text(encoding="ascii").splitlines())
    found = {line[0]: int(line[1]) * 1024 for line in lines}
    total, free = found["MemTotal:"], found["MemAvailable:"]
    with suppress(OSError, ValueError):  # no such group, or "max"
        limit = int((_GROUP / "memory.max").read_text())
        total, free = min(total, limit), min(free, limit - int((_GROUP / "memory.current").read_text()))
    return total, max(0, free)


def _status(key: str) -> int | None:
    if not _STATUS.is_file():
        return None
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, rest = line.partition(":")
        if name == key:
            return int(rest.split()[0]) * 1024
    return None


def release_free_memory() -> bool:
    """Give what nobody uses back to the system, of the pool and of glibc (malloc_trim): True where both were done.

    Called once, after loading: what loading took is not needed again.
    """
    pool.settle()
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError):  # another C library
        return False
