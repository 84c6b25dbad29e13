"""A program: runs one recipe again and again, each time killed with SIGKILL at another moment, then to its end.

    python killed_runs.py '{"recipe": {...}, "out": ..., "cache": ..., "rows": [...], "valid": [...], "kills": [...]}'

A kill is "<moment>:<n>", the n-th time (from 1) that in this process
    event        the consumer gets an event
    checkpoint   a checkpoint's tensors are to be written: half of the file is there
    state        a checkpoint is renamed to its place: it is whole, but aside
    kept         a checkpoint is in its place, the old ones are still there
    adapter      an adapter's tensors are to be written
    swap         the old adapter is set aside, the new one not yet in its place
    text         run.json or done.json is written aside, not yet renamed
It prints one JSON line: how each process ended (a negative number is a signal). Processes are forks of this one,
which saves importing torch for each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import deltaw.store.files
import deltaw.store.peft
import deltaw.train.checkpoint
from deltaw.core.fingerprint import set_cache_dir
from deltaw.train.run import train


def hook(kill: str) -> Any:
    """Install the kill; returns what to call with each event."""
    moment, _, number = kill.partition(":")
    seen: Counter[str] = Counter()

    def at(name: str) -> bool:
        seen[name] += 1
        return name == moment and seen[name] == int(number)

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save, rename, replace = deltaw.store.peft.save_file, os.rename, os.replace
    rmtree = deltaw.train.checkpoint.shutil.rmtree

    def save_checkpoint(tensors: Any, path: Path) -> None:
        save(tensors, path)
        if at("checkpoint"):
            os.truncate(path, path.stat().st_size // 2)
            die()

    def save_adapter(tensors: Any, path: Path, **options: Any) -> None:
        save(tensors, path, **options)
        if at("adapter"):
            die()

    def renamed(old: Any, new: Any) -> None:
        name = Path(new).name
        if name.isdigit() and at("state"):
            die()
        rename(old, new)
        if name.startswith(".adapter.") and name.endswith(".old") and at("swap"):
            die()

    def removed(path: Any, **options: Any) -> None:
        if Path(path).name.isdigit() and at("kept"):
            die()
        rmtree(path, **options)

    def replaced(old: Any, new: Any) -> None:
        if Path(new).name in ("run.json", "done.json") and at("text"):
            die()
        replace(old, new)

    deltaw.train.checkpoint.save_file = save_checkpoint
    deltaw.store.peft.save_file = save_adapter
    os.rename, os.replace = renamed, replaced
    deltaw.train.checkpoint.shutil.rmtree = removed
    return lambda: at("event") and die()


def main(plan: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    set_cache_dir(Path(plan["cache"]))
    ends = []
    for kill in [*plan["kills"], "none:0"]:
        child = os.fork()
        if child == 0:
            try:
                on_event = hook(kill)
                for _ in train(plan["recipe"], plan["out"], train_rows=plan["rows"], valid_rows=plan["valid"]):
                    on_event()
                os._exit(0)
            except BaseException as error:
                print(f"{kill}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(9)
        status = os.waitpid(child, 0)[1]
        ends.append(os.waitstatus_to_exitcode(status))
    print(json.dumps(ends))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
