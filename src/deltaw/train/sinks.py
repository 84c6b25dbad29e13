"""Consumers of events: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from deltaw.errors import RecipeError
from deltaw.store.files import space_explained
from deltaw.train.events import Eval, Event, Step


class MetricsFile:
    """metrics.jsonl: one event a line. On resume it is cut back to what the checkpoint had seen."""

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115  (held for the whole run, closed in close())
        self._file.truncate(min(keep_bytes, self._file.tell()))
        self._file.seek(0, os.SEEK_END)

    def write(self, event: Event) -> None:
        with space_explained("metrics.jsonl", self._path.parent):
            self._file.write(json.dumps(event.plain()).encode() + b"\n")
            self._file.flush()

    def position(self) -> int:
        """Bytes written so far, safely on the disk."""
        with space_explained("metrics.jsonl", self._path.parent):
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        with suppress(OSError):  # what a full disk does not take has been reported by write
            self._file.close()


class TensorBoard:
    """Scalars of steps and evaluations under RUN/tensorboard; needs the `tensorboard` extra."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RecipeError(
                "train.tensorboard needs the tensorboard package: pip install 'deltaw[tensorboard]'."
            ) from None
        self._writer: Any = SummaryWriter(str(folder), purge_step=steps_done + 1)

    def write(self, event: Event) -> None:
        if isinstance(event, Step):
            for key in ("loss", "lr", "grad_norm", "tokens_per_s"):
                self._writer.add_scalar(f"train/{key}", getattr(event, key), event.step)
            if event.growth is not None:
                self._writer.add_scalar("train/growth", event.growth, event.step)
        elif isinstance(event, Eval):
            self._writer.add_scalar(f"valid/{event.metric}", event.value, event.step)

    def close(self) -> None:
        self._writer.close()
