"""Folders and files that appear whole or not at all: write aside, fsync, rename."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaw.errors import WorkFailed


@contextmanager
def space_explained(what: str, where: Path) -> Iterator[None]:
    """Turn a full disk, and a place that cannot be written to, into one sentence: WorkFailed."""
    full = f"No space left while writing {what} to {where}. Free some space and run again."
    limit = f"{what} in {where} would be larger than a file may be here (ulimit -f, or the disk's format)."
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise WorkFailed(full) from None
        if error.errno == errno.EFBIG:
            raise WorkFailed(limit) from None
        if isinstance(error, _UNWRITABLE) or error.errno in (errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP):
            raise WorkFailed(f"Cannot write {what} to {where}: {error.strerror}. Choose another place.") from None
        raise
    except Exception as error:  # safetensors raises its own class around the system's error
        if "No space left" in str(error) or "os error 28" in str(error):
            raise WorkFailed(full) from None
        if "File too large" in str(error) or "os error 27" in str(error):
            raise WorkFailed(limit) from None
        raise


_UNWRITABLE = (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def sync_file(path: Path) -> None:
    """Force a file's (or folder's) bytes to the disk."""
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():  # folders cannot be opened there
        return
    fd = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:  # folders cannot be synced on some systems
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EACCES):
            raise
    finally:
        os.close(fd)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: aside, synced, renamed."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    with space_explained(path.name, path.parent):
        try:
            aside.write_text(text, encoding="utf-8")
            sync_file(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A name to write a file under; it becomes `target` when the block ends well, and vanishes when it does not."""
    target = Path(target).absolute()
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    with space_explained(target.name, target.parent):
        if target.exists() and not target.is_file():
            raise WorkFailed(f"Cannot write {target}: it is a folder or a device. Choose another name.")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            sync_file(aside)
            os.replace(aside, target)
            sync_file(target.parent)
        finally:
            aside.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; it becomes `target` when the block ends well, and vanishes when it does not.

    An existing `target` is replaced: it is set aside first and put back if the rename fails.
    """
    try:
        target = Path(target).resolve()  # "." and links are no names to rename
    except RuntimeError as error:
        raise WorkFailed(f"Cannot write {target}: it leads through too many symbolic links ({error}).") from None
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    with space_explained(target.name, target.parent):
        if target.exists() and not target.is_dir():
            raise WorkFailed(f"Cannot write {target}: it is no folder. Choose another name.")
        target.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        try:
            yield aside
            for path in aside.rglob("*"):
                if path.is_file():
                    _readable(path)
                    sync_file(path)
            sync_file(aside)
            _swap_in(aside, target)
            sync_file(target.parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _readable(path: Path) -> None:
    """The mode that any new file has (safetensors writes files that only their owner may read)."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def _swap_in(aside: Path, target: Path) -> None:
    if not target.exists():
        os.rename(aside, target)
        return
    old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    os.rename(target, old)
    try:
        os.rename(aside, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
