"""Which rows each optimizer step sees: a function of the recipe and the row lengths only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

from deltaw.data.pack import plan_epoch
from deltaw.train.recipe import TrainSpec


class Schedule:
    """The steps of a run.

    n_steps  optimizer steps in all
    """

    def __init__(self, lengths: Sequence[int], spec: TrainSpec) -> None:
        self._lengths = list(lengths)
        self._spec = spec
        self._epoch = lru_cache(maxsize=2)(self._plan)
        self._ends: list[int] = []  # steps up to and including each epoch
        whole = math.ceil(spec.epochs) if spec.steps is None else 10**9
        while len(self._ends) < whole and (spec.steps is None or (self._ends or [0])[-1] < spec.steps):
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epoch(len(self._ends))))
        if spec.steps is not None:
            self.n_steps = spec.steps
        else:
            last = self._ends[-1] - (self._ends[-2] if len(self._ends) > 1 else 0)
            part = spec.epochs - math.floor(spec.epochs)
            self.n_steps = self._ends[-1] - (last - max(1, round(last * part)) if part else 0)

    def _plan(self, epoch: int) -> list[list[int]]:
        return plan_epoch(self._lengths, self._spec.tokens_per_step, seed=self._spec.seed, epoch=epoch)

    def rows(self, step: int) -> list[int]:
        """The rows of optimizer step `step`, counted from 0."""
        epoch = next(e for e, end in enumerate(self._ends) if step < end)
        start = self._ends[epoch - 1] if epoch else 0
        return self._epoch(epoch)[step - start]

    def epochs_done(self, steps: int) -> float:
        """Epochs completed after `steps` steps."""
        for epoch, end in enumerate(self._ends):
            start = self._ends[epoch - 1] if epoch else 0
            if steps <= end:
                return epoch + (steps - start) / (end - start)
        return float(len(self._ends))

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch, or the run, ends after `steps` steps."""
        return steps in self._ends or steps == self.n_steps
