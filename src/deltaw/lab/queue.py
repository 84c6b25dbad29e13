"""Runs that wait for their turn, in a file, so that they wait again when the lab is opened after it ended."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from deltaw.errors import WorkFailed
from deltaw.store.files import write_text


class Queue:
    """Names in the order of asking, in FOLDER/queue.json.

    One lab at a time owns the file, until its process ends, however it ends. A second lab on the same folder has a
    queue of its own, which ends with it.
    """

    def __init__(self, folder: Path) -> None:
        self.names: list[str] = []
        self._file = folder / "queue.json"
        self._lock = FileLock(folder / ".queue.lock", thread_local=False)

    def left(self) -> list[str]:
        """What waited when the lab before this one ended; [] where there was none, or it has not ended."""
        if not self._file.is_file() or not self._is_own():
            return []
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
        except ValueError:  # damaged by a full disk or by hand: nothing waits
            return []

    def put(self, name: str) -> None:
        """Let a run wait behind the others."""
        self._keep([*self.names, name])
        self.names.append(name)

    def take(self, name: str) -> None:
        """It waits no longer."""
        self.names.remove(name)
        with suppress(WorkFailed):  # a full disk: who opens a lab looks whether it still has to wait
            self._keep(self.names)

    def _keep(self, names: list[str]) -> None:
        if self._is_own():
            write_text(self._file, json.dumps(names))

    def _is_own(self) -> bool:
        try:
            if not self._lock.is_locked:
                self._lock.acquire(timeout=0)
        except Timeout:
            return False
        return True
