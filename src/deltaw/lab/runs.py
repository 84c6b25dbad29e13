"""Runs that the workbench begins, each a `deltaw train` of its own: one trains at a time, the others wait."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import RLock, Thread
from typing import Any

import yaml

from deltaw.errors import RunError, WorkFailed
from deltaw.lab.queue import Queue
from deltaw.lab.run_files import Plain, RunFiles
from deltaw.store.files import space_explained, write_text
from deltaw.train.checkpoint import is_training
from deltaw.train.recipe import load_recipe

PROGRAM = [sys.executable, "-c", "from deltaw.cli.main import main; main()"]
LOOKS_S = 0.2
"""Seconds between two looks at whether the next run can begin."""


class Runs:
    """The runs of a folder and the processes that train them.

    A process goes on when the lab ends: it has a session of its own, and all that it says is in files. A lab that is
    opened again finds it by RUNS/recipes/NAME.pid. What waits is in a file too (queue.py): `wait_again`.
    """

    def __init__(self, runs: Path) -> None:
        self.files = RunFiles(runs)
        self._lock = RLock()
        self._queue = Queue(self.files.recipes)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._worker: Thread | None = None
        self._refused = ""

    # What is there -------------------------------------------------------------------------------

    def state(self, name: str) -> Plain:
        """{"state", "sentence"}: waiting, running, stopped, failed or done, from files and processes."""
        folder = self.files.folder(name)
        with self._lock:
            if name in self._queue.names:
                before = self._queue.names.index(name)
                for_whom = f"It waits for the run that trains, and {before} before it." if before else ""
                return _told("waiting", self._refused or for_whom)
            if self._alive(name) or is_training(folder):
                return _told("running", "" if (folder / "metrics.jsonl").is_file() else "The base is being loaded.")
            if (folder / "done.json").is_file():
                return _told("done")
            child = self._children.get(name)
            if why := self.files.failure(name):
                return _told("failed", why)
            if child is not None and child.returncode == -signal.SIGKILL:
                return _told("stopped", "Its process was killed. It goes on from its last checkpoint.")
            if child is not None and child.returncode in (1, 2):  # those of a failure, which else says why
                return _told("failed", f"Its process ended with {child.returncode} and left no word: is the disk full?")
            if not (folder / "run.json").is_file():
                return _told("stopped", "It has not begun.")
            return _told("stopped", "It goes on from its last checkpoint.")

    def all(self) -> list[Plain]:
        """Every run with its state and last numbers, the newest first."""
        found = [self.files.facts(name) | self.state(name) for name in self.files.names()]
        return sorted(found, key=lambda run: -float(run["begun"]))

    def one(self, name: str) -> Plain:
        """A run with its recipe and the command that does the same in a terminal. Raises NotFound."""
        folder = self.files.find(name)
        text, given = self.files.text(name), self.files.given(name)
        where = self.files.recipe(name) if text is not None else "RECIPE"
        result = next((str(p) for p in (folder / "adapter", folder / "model") if p.is_dir()), None)
        return {
            **self.files.facts(name),
            **self.state(name),
            "given": given,
            "recipe": text or yaml.safe_dump(self.files.settings(name), sort_keys=False),
            "command": f"deltaw train {where} --out {folder}",
            "result": result,
        }

    # What changes them ---------------------------------------------------------------------------

    def start(self, name: str, plain: Plain) -> None:
        """Begin a run, or let it wait. Raises RecipeError and the like for a recipe, RunError for a name in use."""
        folder, path = self.files.folder(name), self.files.recipe(name)
        recipe = load_recipe(plain)
        if recipe.data.train is None:
            raise RunError("data.train is missing: choose a file of rows.")
        with self._lock:
            if folder.exists() or path.exists():
                raise RunError(f"there is a run {name!r} already: choose another name.")
            with space_explained(path.name, path.parent):
                self.files.recipes.mkdir(parents=True, exist_ok=True)
                file = open(path, "x", encoding="utf-8")  # noqa: SIM115  (closed below)
            try:
                with space_explained(path.name, path.parent), file:
                    file.write(recipe_text(plain))
                self._ask(name)
            except BaseException:
                path.unlink()  # the name stays free
                raise

    def resume(self, name: str) -> None:
        """Go on with a run that was stopped or failed. Raises NotFound, RunError."""
        self.files.find(name)
        with self._lock:
            if self.files.text(name) is None:
                raise RunError(f"run {name!r} was begun elsewhere: go on there, with the same command.")
            if (state := self.state(name)["state"]) not in ("stopped", "failed"):
                raise RunError(f"run {name!r} is {state}: there is nothing to go on with.")
            self._ask(name)

    def stop(self, name: str) -> None:
        """Ask a run to end after its present step, with a checkpoint; one that waits leaves the queue.

        Raises NotFound, and RunError for a run that does not train or was begun in a terminal.
        """
        self.files.find(name)
        with self._lock:
            if name in self._queue.names:
                self._queue.take(name)
                return
            pid = self._alive(name)
            if pid is None:
                trains = is_training(self.files.folder(name))
                why = "was begun in a terminal: stop it there, with Ctrl-C." if trains else "does not train."
                raise RunError(f"run {name!r} {why}")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    # Processes -----------------------------------------------------------------------------------

    def wait_again(self) -> None:
        """Let the runs wait that waited when the lab before this one ended."""
        with self._lock:
            for name in self._queue.left():
                if name in self.files.names() and self.state(name)["state"] == "stopped":
                    self._queue.put(name)
            self._begin()

    def _ask(self, name: str) -> None:
        self.files.log(name).unlink(missing_ok=True)
        self._queue.put(name)
        self._begin()

    def _begin(self) -> None:
        self._try_next()
        if self._queue.names and self._worker is None:
            self._worker = Thread(target=self._work, daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while True:
            time.sleep(LOOKS_S)
            with self._lock:
                self._try_next()
                if not self._queue.names:
                    self._worker = None
                    return

    def _try_next(self) -> None:
        """The same; what the system refuses is tried again, and told by those that wait."""
        try:
            self._next()
            self._refused = ""
        except (OSError, WorkFailed) as problem:
            self._refused = f"It cannot begin yet: {problem}"

    def _next(self) -> None:
        """Begin the first that waits, when nothing trains."""
        if self._queue.names and not any(self._trains(name) for name in self.files.names()):
            name = self._queue.names[0]
            self._launch(name)
            self._queue.take(name)

    def _trains(self, name: str) -> bool:
        return self._alive(name) is not None or is_training(self.files.folder(name))

    def _launch(self, name: str) -> None:
        command = [*PROGRAM, "train", str(self.files.recipe(name)), "--out", str(self.files.folder(name)), "--json"]
        with open(self.files.log(name), "wb") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        try:
            write_text(self._pid_file(name), json.dumps({"pid": child.pid, "born": _born(child.pid)}))
        except BaseException:  # nobody could stop it
            child.kill()
            child.wait()
            raise
        self._children[name] = child

    def _pid_file(self, name: str) -> Path:
        return self.files.recipe(name).with_suffix(".pid")

    def _alive(self, name: str) -> int | None:
        """The process that trains a run which a workbench began, this one or one before it."""
        if (child := self._children.get(name)) is not None:
            return child.pid if child.poll() is None else None
        try:
            kept = json.loads(self._pid_file(name).read_text(encoding="ascii"))
            pid, born = int(kept["pid"]), kept["born"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if born is not None and _born(pid) == born else None


def recipe_text(plain: Plain) -> str:
    """A recipe as YAML."""
    return str(yaml.safe_dump(plain, sort_keys=False))


def _told(state: str, sentence: str = "") -> dict[str, Any]:
    return {"state": state, "sentence": sentence}


def _born(pid: int) -> str | None:
    """When a process began, as the kernel counts it, so that a number that is used again is told apart; else None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]
