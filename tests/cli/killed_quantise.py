"""A program: quantises one base, each time killed with SIGKILL at another moment, then to its end.

    python killed_quantise.py BASE OUT CACHE TEXT

It prints one JSON line per moment: how that process ended, and what stands in OUT's folder afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

import deltaw.merge.checkpoint
import deltaw.merge.quantise
from deltaw.core.fingerprint import set_cache_dir
from deltaw.merge.quantise import Calibration, quantise_base
from deltaw.model.quantised import Format


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hook(moment: str, out: Path) -> None:
    """Die at the first step of tuning, half way through the weights, before the note, or before the last rename."""
    save, write, rename = deltaw.merge.checkpoint.save_file, deltaw.merge.quantise.write_text, os.rename

    def half_saved(tensors: object, path: Path, **options: object) -> None:
        save(tensors, path, **options)
        os.truncate(path, path.stat().st_size // 2)
        die()

    if moment == "tuning":
        torch.optim.Adam.step = die
    elif moment == "weights":
        deltaw.merge.checkpoint.save_file = half_saved
    elif moment == "note":
        deltaw.merge.quantise.write_text = lambda at, text: die() if at.name == "deltaw_base.json" else write(at, text)
    elif moment == "rename":
        os.rename = lambda old, new: die() if Path(new) == out else rename(old, new)


def main(base: Path, out: Path, cache: Path, text: Path) -> None:
    torch.set_num_threads(1)
    set_cache_dir(cache)
    for moment in ("tuning", "weights", "note", "rename", "never"):
        child = os.fork()
        if child == 0:
            hook(moment, out)
            quantise_base(base, out, Format("nf4", 64, True), calibration=Calibration(text, 700))
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        there = sorted(p.name for p in out.iterdir()) if out.exists() else None
        print(json.dumps({"moment": moment, "ended": ended, "there": there}), flush=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
