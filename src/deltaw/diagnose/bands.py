"""How large the steps of a training were, beside what is usual: the values that the rule on alpha looks at."""

from __future__ import annotations

from dataclasses import dataclass

from deltaw.diagnose.facts import Facts
from deltaw.diagnose.scale import LARGE, SCALE, SMALL_TURN, STEP, WILD_SCALE

RATIO = (SMALL_TURN / 5, LARGE)
"""Update norm over weight norm that raises no suspicion."""


@dataclass(frozen=True)
class Band:
    """One measured value and what is usual; docs/diagnosis.md has the runs that the limits come from.

    low, high  the usual values lie between them; None: no limit on that side
    wild       from here on the rule on alpha speaks by itself, or with the loss as witness
    """

    what: str
    value: float
    low: float | None
    high: float | None
    wild: float | None


def bands(facts: Facts) -> list[Band]:
    """The values that are known: alpha / rank, what a step and all steps can turn, update over weight."""
    found = []
    reach, ratio = facts.median(lambda r: r.reach), facts.median(lambda r: r.ratio)
    if facts.scale is not None:
        found.append(Band("effective scale, alpha / rank", abs(facts.scale), *SCALE, WILD_SCALE))
    if reach is not None and facts.rate is not None:
        step = reach * facts.rate
        found.append(Band("one step can turn a row of a weight by", step, None, STEP, None))
        if facts.full_steps is not None:
            found.append(Band("all steps together can turn it by", step * facts.full_steps, SMALL_TURN, None, None))
    if ratio:
        found.append(Band("update norm over weight norm", ratio, *RATIO, None))
    return found
