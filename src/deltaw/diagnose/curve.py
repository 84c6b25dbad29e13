"""What a run's loss curve says: did it fall, where did it stop falling, did it come back up.

A step's loss is of that step's rows only, so it jumps about. The curve is cut into SEGMENTS parts of equal length; a
part's mean is compared with the noise of such a mean, which comes from the differences of neighbouring steps (von
Neumann 1941), so that a trend does not count as noise.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from deltaw.errors import RunError

SEGMENTS = 8
FEWEST_STEPS = 16
"""Fewer have no curve to speak of: two steps a segment."""
SURE = 3.0
"""Noise of a mean that a difference of means must exceed to count."""


@dataclass(frozen=True)
class StepPoint:
    """One optimizer step: loss is the mean over its target tokens, before the update."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    epoch: float


@dataclass(frozen=True)
class EvalPoint:
    """One evaluation on the validation rows; `loss` is None where only a metric was measured."""

    step: int
    loss: float | None
    is_best: bool


@dataclass(frozen=True)
class Log:
    """What RUN/metrics.jsonl holds. n_steps: that the run was to have; rows: of training data, None if not told."""

    steps: tuple[StepPoint, ...]
    evals: tuple[EvalPoint, ...]
    n_steps: int | None
    rows: int | None
    finished: bool


@dataclass(frozen=True)
class Curve:
    """What the losses of a run of FEWEST_STEPS or more say. Losses are nats a target token.

    start       of the first step: the base's own, on that step's rows
    final       mean of the last quarter;  best: of the best segment
    means       of the segments
    noise       of the mean of one segment
    moved       share of `start` that was learned: (start - final) / start
    has_fallen  whether `final` is below the first step's loss, or the first segment's, by more than its noise
    plateau_step  after it no segment is better by more than noise and 5 % of the drop; None: it fell to the end
    plateau_lr  share of the summed learning rate that was spent by then: a schedule that ends at zero makes every curve
                flat at its end, so a plateau is early only if much of the learning rate came after it
    rise        how far the last quarter is above the best segment, as a share of what was learned by then
    has_risen   whether that is more than noise
    peak        largest mean of three steps in a row, over `start`: above 1.25 the first steps threw the model off
    """

    start: float
    final: float
    best: float
    means: tuple[float, ...]
    noise: float
    moved: float
    has_fallen: bool
    plateau_step: int | None
    plateau_lr: float | None
    rise: float
    has_risen: bool
    peak: float


def read_log(run: Path) -> Log | None:
    """The events of a run's metrics.jsonl; None where there is no such file.

    Raises RunError for a line that is no event; an unfinished last line of a killed run is left out.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                events.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            if number == len(lines):  # a killed process wrote half a line
                continue
            what = f"{path}:{number} is no event: {line[:60]!r}"
            raise RunError(f"{what}. Restore the file, or diagnose the adapter alone.") from None
    try:
        return _understood(events, (run / "done.json").is_file())
    except (KeyError, TypeError, ValueError) as problem:
        raise RunError(f"{path} holds an event without what runs write ({problem!r}).") from None


def _understood(events: list[dict[str, Any]], finished: bool) -> Log:
    steps: dict[int, StepPoint] = {}
    evals: dict[int, EvalPoint] = {}
    n_steps = rows = None
    for e in events:
        if e["event"] == "start":
            n_steps, rows = int(e["n_steps"]), int(e["rows"])
        elif e["event"] == "step":
            values = (float(e[key]) for key in ("loss", "lr", "grad_norm", "epoch"))
            steps[int(e["step"])] = StepPoint(int(e["step"]), *values)
        elif e["event"] == "eval":
            loss = e["loss"] if e["loss"] is not None or e["metric"] != "loss" else e["value"]
            evals[int(e["step"])] = EvalPoint(int(e["step"]), None if loss is None else float(loss), bool(e["is_best"]))
    return Log(tuple(steps.values()), tuple(evals.values()), n_steps, rows, finished)


def read_curve(steps: tuple[StepPoint, ...]) -> Curve | None:
    """What the losses say; None for fewer than FEWEST_STEPS steps, or where one is not finite."""
    n = len(steps)
    losses = [s.loss for s in steps]
    if n < FEWEST_STEPS or not all(map(math.isfinite, losses)):
        return None
    cuts = [round(i * n / SEGMENTS) for i in range(SEGMENTS + 1)]
    means = [statistics.fmean(losses[a:b]) for a, b in pairwise(cuts)]
    tail = losses[n - n // 4 :]
    final = statistics.fmean(tail)
    later = losses[n // 4 :]
    step_noise = math.sqrt(statistics.fmean((b - a) ** 2 for a, b in pairwise(later)) / 2)
    noise = step_noise / math.sqrt(n / SEGMENTS)
    start = losses[0]
    best_at = min(range(SEGMENTS), key=means.__getitem__)
    best = means[best_at]
    learned = max(start, *means) - best
    margin = max(SURE * noise, 0.05 * learned)
    at = next(k for k in range(SEGMENTS) if min(means[k:]) >= means[k] - margin)
    settled = at < SEGMENTS - 2
    rise = final - best
    threes = map(statistics.fmean, zip(losses, losses[1:], losses[2:], strict=False))
    rates = [s.lr for s in steps]
    spent = sum(rates[: cuts[at + 1]]) / sum(rates) if sum(rates) > 0 else cuts[at + 1] / n
    return Curve(
        start=start,
        final=final,
        best=best,
        means=tuple(means),
        noise=noise,
        moved=(start - final) / start if start > 0 else 0.0,
        has_fallen=max(start - SURE * step_noise, means[0] - SURE * noise) > final,
        plateau_step=steps[cuts[at + 1] - 1].step if settled else None,
        plateau_lr=spent if settled else None,
        rise=rise / learned if learned > 0 else 0.0,
        has_risen=best_at < SEGMENTS - 1 and rise > SURE * noise * math.sqrt(1.5),
        peak=max(threes) / start if start > 0 else 1.0,
    )
