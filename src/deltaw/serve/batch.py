"""One step's work: rows of several sequences, prompts' chunks and single tokens together, sorted by adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Segment(NamedTuple):
    """Rows start to stop (exclusive) that wear one adapter; key None: the base alone."""

    start: int
    stop: int
    key: str | None


@dataclass(frozen=True)
class StepBatch:
    """T rows (tokens) of S sequences. A sequence's rows follow one another; its last is the newest token.

    ids        [T] int64; id -1 - i stands for vector i that the row's adapter has among the inputs (prompt tuning)
    positions  [T] int64: place in the sequence, virtual tokens in front included; the place in the pages too
    slots      [T] int64: where the row's keys and values go, page * PAGE_TOKENS + place in the page
    bounds     [S + 1] int64: where sequences begin among the rows, and T
    contexts   [S] int64: tokens in pages before the sequence's first row; the row sees those and the rows up to itself
    tables     [S, P] int32: pages of each sequence, in order; what lies behind its last page means nothing
    segments   runs of rows of one adapter, in order, covering 0 to T
    wanted     [n] int64: rows whose logits are wanted, ascending; at most one of a sequence, its last
    head       segments of the wanted rows, covering 0 to n

    Everything is on the base's device.
    """

    ids: Tensor
    positions: Tensor
    slots: Tensor
    bounds: Tensor
    contexts: Tensor
    tables: Tensor
    segments: tuple[Segment, ...]
    wanted: Tensor
    head: tuple[Segment, ...]

    @property
    def n_rows(self) -> int:
        return len(self.ids)
