"""Slow checks of a diagnosis, each in a process of its own, so that it can be stopped and the page stays quick."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from deltaw.errors import WorkFailed

MOST_RUNNING = 2
KEPT = 64
"""Checks that are remembered; the oldest that does not run goes first."""
SAID = 200
Key = tuple[Any, ...]
_PROGRAM = (sys.executable, "-c", "from deltaw.cli.main import main; main()")


class Check:
    """One `deltaw diagnose ... --json` at work.

    state   "running", "done", "failed" or "stopped"
    said    its sentences so far, the newest last
    result  the diagnosis as plain data; error: why there is none
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self.state = "running"
        self.said: list[str] = []
        self.result: dict[str, Any] | None = None
        self.error: str | None = None
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [*_PROGRAM, *words], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
        )
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._listen, self._collect)]
        for thread in self._threads:
            thread.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                if line.strip():
                    self.said = [*self.said, line.strip()][-SAID:]

    def _collect(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as out:
            told = out.read()
        code = self._process.wait()
        self._threads[0].join()
        if self.state == "stopped":
            return
        try:
            self.result = json.loads(told) if code == 0 else None
        except ValueError:
            self.result = None
        if self.result is None:
            last = self.said[-1] if self.said else f"the check ended with {code} and said nothing."
            self.error = last.partition(": ")[2] if last.split(":")[0].isidentifier() else last
        self.state = "failed" if self.result is None else "done"

    def stop(self) -> None:
        """End it; nothing if it has ended."""
        if self.state == "running":
            self.state = "stopped"
            self._process.terminate()

    def wait(self, timeout_s: float) -> None:
        """Until it has ended."""
        self._threads[1].join(timeout_s)

    def plain(self) -> dict[str, Any]:
        """What the page shows."""
        return {"state": self.state, "said": self.said[-8:], "error": self.error, "result": self.result}


class Checks:
    """Checks by what they look at. A finished one is kept until what it looked at changes, which is another key."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, Check] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Check | None:
        """The check under this key; None: none was asked for."""
        return self._kept.get(key)

    def start(self, key: Key, words: Sequence[str]) -> Check:
        """Begin it, unless it runs or is done with these words; with others it begins anew.

        Raises WorkFailed where too many run.
        """
        with self._lock:
            there = self._kept.get(key)
            if there is not None and there.words == tuple(words) and there.state in ("running", "done"):
                return there
            if there is not None and there.state == "running":
                raise WorkFailed("This check runs already, with other settings: wait for it, or stop it.")
            if sum(c.state == "running" for c in self._kept.values()) >= MOST_RUNNING:
                raise WorkFailed(f"{MOST_RUNNING} checks run already: wait for one of them, or stop it.")
            made = self._kept[key] = Check(words)
            self._kept.move_to_end(key)
            for old in [k for k, c in self._kept.items() if c.state != "running"][: max(0, len(self._kept) - KEPT)]:
                del self._kept[old]
            return made

    def stop_all(self) -> None:
        """End everything that runs."""
        with self._lock:
            for check in self._kept.values():
                check.stop()
