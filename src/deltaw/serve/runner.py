"""What computes a step."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from deltaw.model.resident import Resident
from deltaw.serve.batch import StepBatch


class Runner(Protocol):
    """Computes steps. Everything is called in the engine's thread, adapters between steps."""

    def add(self, key: str, resident: Resident) -> None:
        """Make an adapter usable under `key`, which segments name."""

    def remove(self, key: str) -> None:
        """Forget it; no step will name it again."""

    def run(self, batch: StepBatch) -> Tensor:
        """Write keys and values of all rows into the pages; logits of the wanted rows [n, vocab], float32 or base's."""
