"""What the rules of a diagnosis see, and what they say."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaw.diagnose.curve import Curve, Log
from deltaw.diagnose.general import Change, Forgetting
from deltaw.diagnose.precision import Rounded
from deltaw.diagnose.sites import SiteRow

BLOWN = (3.0, 100.0)  # loss and gradient norm over those of the first step, in a run that stopped early
PEAK, RISE = 1.25, 0.25  # loss over the first one in the first steps; share of what was learned that was lost again


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong. kind: a stable name for programs; where: places, the worst first."""

    kind: str
    title: str
    message: str
    remedy: str
    where: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Trial:
    """The same steps with another rank: losses of the last quarter of the steps, paired by step.

    rank, other     the run's and the tried one;  loss, reached: their mean losses
    gain            mean of the differences;  noise: of that mean
    """

    rank: int
    other: int
    steps: int
    loss: float
    reached: float
    gain: float
    noise: float


@dataclass(frozen=True)
class Facts:
    """What the rules see. None: not known.

    rate        highest learning rate that B had;  full_steps: the summed learning rate over the highest one
    scale       median of alpha / rank as it was applied;  alpha, rank: as set
    bad         names of tensors with NaN or Inf
    mismatch    why the base is not the adapter's, as sentences
    rounded     by name of a number format, over all places; "written": a merged folder
    written_in_bits  whether that folder is quantised
    """

    rows: list[SiteRow] = field(default_factory=list)
    log: Log | None = None
    curve: Curve | None = None
    rate: float | None = None
    scale: float | None = None
    alpha: float | None = None
    rank: int | None = None
    moves_else: bool = False
    bad: tuple[str, ...] = ()
    mismatch: tuple[str, ...] = ()
    rounded: dict[str, Rounded] = field(default_factory=dict)
    written_in_bits: bool = False
    forgetting: Forgetting | None = None
    data: Change | None = None
    trial: Trial | None = None

    def median(self, what: Callable[[SiteRow], float | None]) -> float | None:
        """The median over places of what is known."""
        values = [v for row in self.rows if (v := what(row)) is not None]
        return statistics.median(values) if values else None

    @property
    def died(self) -> str | None:
        """What an unfinished run too short for a curve says of steps that were too large, as a clause; else None."""
        if self.log is None or self.curve is not None or self.log.finished or len(self.log.steps) < 2:
            return None
        first, *later = self.log.steps
        loss, gradient = max(s.loss for s in later), max(s.grad_norm for s in later)
        if loss <= BLOWN[0] * first.loss and gradient <= BLOWN[1] * first.grad_norm:
            return None
        return (
            f"the run stopped after step {later[-1].step}, its loss up to {loss:.3g} ({first.loss:.3g} at the first "
            f"step), its gradient's norm up to {gradient:.3g} ({first.grad_norm:.3g})"
        )

    @property
    def full_steps(self) -> float | None:
        """How many steps at the highest rate all steps together are worth."""
        rates = [s.lr for s in self.log.steps] if self.log else []
        return sum(rates) / max(rates) if rates and max(rates) > 0 else None
