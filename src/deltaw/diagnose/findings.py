"""What is wrong, said in a sentence with the values found and what to do: one rule a failure of SPEC section 5.

Every rule is a function of `Facts` and gives a `Finding` or None. The bands come from measured runs; docs/diagnosis.md
has the runs, the values and the reasons. A rule that lacks a fact stays silent: `diagnose` says which checks were not
made.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from deltaw.diagnose.curve import Curve, Log
from deltaw.diagnose.general import Change, Forgetting
from deltaw.diagnose.precision import Rounded
from deltaw.diagnose.sites import SiteRow

FLAT = 0.3  # last singular value over the first: more ends while it is flat
LEFT, MUCH_LEFT = 0.15, 0.25  # share of the first loss that is left where a rank that was too low stopped
MOVED = 0.15  # share of the first loss that must have been learned: else the rank is not what was missing
LATE = 0.95  # share of the learning rate after which a plateau is only the end of the schedule
STEP = 0.02  # of a weight's row that one step can turn it by
LARGE, HUGE = 0.05, 3.0  # update norm over weight norm
PEAK, RISE = 1.25, 0.25  # loss over the first one in the first steps; share of what was learned that was lost again
SCALE = (0.25, 16.0)  # alpha / rank that is usual
WILD_SCALE = 32.0
SMALL_TURN = 1e-3  # of a weight's row that all steps together can turn it by
SLOW_TURN = (3e-3, 1e-2)  # the same where the loss barely moved: with a usual scale, with an unusual one
BARELY = 0.1  # of the first loss: less was learned
STEP_ALONE = (5e-5, 2e-2)  # scale * learning rate, where no base is there to compare with
SWALLOWED = 0.5  # energy of the rounding over that of the update
PERPLEXITY, POINTS, CHANCE = 1.25, 0.03, 0.01  # forgetting: ratio; drop of accuracy and the chance that it is luck
BETTER = 0.1  # share of the loss that a higher rank must save in the same steps


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
    forgetting: Forgetting | None = None
    data: Change | None = None
    trial: Trial | None = None

    def median(self, what: Callable[[SiteRow], float | None]) -> float | None:
        """The median over places of what is known."""
        values = [v for row in self.rows if (v := what(row)) is not None]
        return statistics.median(values) if values else None

    @property
    def full_steps(self) -> float | None:
        """How many steps at the highest rate all steps together are worth."""
        rates = [s.lr for s in self.log.steps] if self.log else []
        return sum(rates) / max(rates) if rates and max(rates) > 0 else None


def findings(facts: Facts) -> list[Finding]:
    """Everything that is wrong, causes before what follows from them."""
    found = [rule(facts) for rule in RULES]
    kept = [f for f in found if f is not None]
    kinds = {f.kind for f in kept}
    caused = {"diverged": "alpha_misconfigured", "nothing_learned": "alpha_misconfigured"}
    return [f for f in kept if caused.get(f.kind) not in kinds]


def not_finite(facts: Facts) -> Finding | None:
    """NaN or Inf in the adapter's tensors."""
    if not facts.bad:
        return None
    return Finding(
        "not_finite",
        "The adapter holds NaN or Inf",
        f"{len(facts.bad)} of its tensors hold NaN or Inf, the first {facts.bad[0]}: every answer would be NaN.",
        "Train again with a lower learning rate or alpha, or take an earlier checkpoint.",
        facts.bad[:20],
    )


def no_update(facts: Facts) -> Finding | None:
    """An update of exactly zero, at all places or at some."""
    if not facts.rows or facts.moves_else:
        return None
    still = [r.name for r in facts.rows if r.update_norm == 0 and not r.bias_moved]
    unknown = any(r.spectrum is None and r.bias_moved is None for r in facts.rows)
    if not still or unknown:
        return None
    if len(still) == len(facts.rows):
        return Finding(
            "no_update",
            "The adapter changes nothing",
            f"The update is exactly zero at all {len(still)} places (B A = 0): it loads and does nothing.",
            "It was saved before it trained, or a tool lost its tensors: save it again after training.",
        )
    return Finding(
        "dead_places",
        "The adapter changes nothing at some places",
        f"The update is exactly zero at {len(still)} of {len(facts.rows)} places, the first {still[0]}.",
        "Their tensors never trained or were lost on the way: compare the file with the one that training wrote, "
        "or leave these places out of the targets.",
        tuple(still[:20]),
    )


def base_mismatch(facts: Facts) -> Finding | None:
    """Another base than the one that the adapter was trained on."""
    if not facts.mismatch:
        return None
    return Finding(
        "base_mismatch",
        "The adapter belongs to another base",
        "This is not the base that the adapter was trained on: " + "; ".join(facts.mismatch) + ".",
        "Use the base that the adapter names, or train it again on this one: with the same shapes it would load "
        "elsewhere without a word and answer wrongly.",
    )


def alpha_misconfigured(facts: Facts) -> Finding | None:
    """Steps far too large or too small: scale times learning rate against the weights, with the loss as witness."""
    return _too_large(facts) or _too_small(facts)


def _too_large(facts: Facts) -> Finding | None:
    ratio, step, curve = facts.median(lambda r: r.ratio), _step(facts), facts.curve
    wild = facts.scale is not None and abs(facts.scale) >= WILD_SCALE
    witness = [] if curve is None else _loss_says(curve)
    if ratio is not None and step is not None:
        out_of_band = step >= STEP and ratio >= LARGE and (bool(witness) or wild)
    elif ratio is not None:
        out_of_band = ratio >= 2 * LARGE and wild
    else:
        size = _size_alone(facts)
        out_of_band = size is not None and size >= STEP_ALONE[1] and (bool(witness) or wild)
    if not out_of_band and not (ratio is not None and ratio >= HUGE):
        return None
    said = [_setting(facts)]
    if step is not None:
        said.append(f"one step can turn a row of a weight by {step:.1%} of its norm (under {STEP:.0%} is usual)")
    if ratio is not None:
        said.append(f"the update's norm is {ratio:.2g} of its weight's (median of {len(facts.rows)} places)")
    return Finding(
        "alpha_misconfigured",
        "The update is too large: alpha or learning rate too high",
        "; ".join([*said, *witness]) + ".",
        _remedy(facts, step, down=True),
    )


def _too_small(facts: Facts) -> Finding | None:
    ratio, step, curve, full = facts.median(lambda r: r.ratio), _step(facts), facts.curve, facts.full_steps
    if ratio == 0 or (curve is None and facts.log is not None):  # no update at all; or too few steps to judge
        return None
    settled = curve is not None and curve.has_fallen and (curve.plateau_lr or 1.0) <= 0.9
    said = [_setting(facts)]
    if curve is not None and step is not None and full is not None:
        turn = step * full
        barely = curve.moved < BARELY
        slow = turn < SLOW_TURN[_is_unusual(facts)] and barely
        if not slow and (settled or turn >= SMALL_TURN):
            return None
        said.append(f"all steps together can turn a row of a weight by {turn:.2%} of its norm (over 0.5 % is usual)")
    elif curve is not None:
        size = _size_alone(facts)
        if settled or size is None or size >= STEP_ALONE[0]:
            return None
        said.append(f"scale * learning rate is {size:.2g} ({STEP_ALONE[0]:g} and more is usual)")
    elif ratio is None or ratio >= SMALL_TURN / 5:
        return None
    if ratio is not None:
        said.append(f"the update's norm is {ratio:.2g} of its weight's (median of {len(facts.rows)} places)")
    if curve is not None:
        said.append(f"the loss went from {curve.start:.3g} to {curve.final:.3g} and had not settled")
    return Finding(
        "alpha_misconfigured",
        "The update is too small: alpha or learning rate too low",
        "; ".join(said) + ".",
        _remedy(facts, step, down=False),
    )


def _loss_says(curve: Curve) -> list[str]:
    """What in the curve tells of steps that were too large."""
    said = []
    if curve.peak >= PEAK:
        said.append(f"the loss rose to {curve.peak:.3g} times its first value")
    if curve.has_risen and curve.rise >= RISE:
        said.append(f"it lost {curve.rise:.0%} of what it had learned again")
    if not curve.has_fallen:
        said.append(f"the loss is {curve.final:.3g} at the end, {curve.start:.3g} at the start")
    return said


def _step(facts: Facts) -> float | None:
    reach = facts.median(lambda r: r.reach)
    return None if reach is None or facts.rate is None else reach * facts.rate


def _size_alone(facts: Facts) -> float | None:
    return None if facts.scale is None or facts.rate is None else abs(facts.scale) * facts.rate


def _setting(facts: Facts) -> str:
    scale = "unknown" if facts.scale is None else f"{facts.scale:.3g}"
    set_to = "" if facts.alpha is None else f"alpha is {facts.alpha:g} at rank {facts.rank}, "
    rate = "" if facts.rate is None else f" and the learning rate {facts.rate:.3g}"
    return f"{set_to}the effective scale is {scale}{rate}"


def _is_unusual(facts: Facts) -> bool:
    return facts.scale is not None and not SCALE[0] <= abs(facts.scale) <= SCALE[1]


def _remedy(facts: Facts, step: float | None, down: bool) -> str:
    alpha = "" if facts.rank is None else f"set alpha to about {2 * facts.rank} (twice the rank)"
    unusual = _is_unusual(facts)
    rate = "lower" if down else "raise"
    to = ""
    if step is not None and facts.rate is not None and not unusual and step > 0:
        to = f" to about {float(f'{facts.rate * (0.003 if down else 0.001) / step:.1g}'):g}"
    more = "" if down or unusual else ", or train for more steps"
    if unusual and alpha:
        return f"{alpha[0].upper()}{alpha[1:]} and keep the learning rate, or {rate} the learning rate in proportion."
    return f"{rate.capitalize()} the learning rate{to}{more}."


def diverged(facts: Facts) -> Finding | None:
    """A loss that ends above where it began, or gave back much of what it had learned."""
    curve = facts.curve
    if curve is None:
        return None
    worse = curve.final > curve.start * 1.05 and curve.final - curve.start > 3 * curve.noise
    if not worse and not (curve.has_risen and curve.rise >= RISE):
        return None
    return Finding(
        "diverged",
        "The loss rose",
        f"The loss began at {curve.start:.3g}, was {curve.best:.3g} at its best and ended at {curve.final:.3g}.",
        "Lower the learning rate, lengthen the warm-up, or keep the best adapter with rows to validate on "
        "(eval.keep: best).",
    )


def nothing_learned(facts: Facts) -> Finding | None:
    """A loss that did not move although there were steps enough."""
    curve, log = facts.curve, facts.log
    if curve is None or log is None or len(log.steps) < 32 or curve.has_fallen:
        return None
    if abs(curve.means[0] - curve.final) >= 0.01 * curve.means[0]:
        return None
    return Finding(
        "nothing_learned",
        "The loss did not move",
        f"In {len(log.steps)} steps the loss went from {curve.start:.3g} to {curve.final:.3g}: that is its noise.",
        "See what is to be learned with deltaw data show RECIPE: are the targets marked? Then raise the learning rate.",
    )


def rank_too_low(facts: Facts) -> Finding | None:
    """The same steps reach less at a higher rank; or, untried: a plateau far up, and every rank in use to the last."""
    if facts.trial is not None:
        return _tried(facts.trial)
    curve = facts.curve
    low = [r for r in facts.rows if r.spectrum is not None and r.rank and r.spectrum.given == min(r.rank, *r.shape)]
    if curve is None or not low or curve.plateau_lr is None or overfitting(facts) is not None:
        return None
    rest = curve.final / curve.start if curve.start > 0 else 0.0
    flat = [r for r in low if _is_flat(r, rest)]
    if len(flat) <= len(low) / 2 or not LEFT <= rest <= 1 - MOVED or curve.plateau_lr > LATE:
        return None
    if not curve.has_fallen or (curve.has_risen and curve.rise >= RISE) or curve.peak >= PEAK:
        return None
    ranks = sorted({r.rank for r in flat if r.rank})
    last = statistics.median(r.spectrum.last for r in flat if r.spectrum is not None)
    spectrum = (
        "rank 1 leaves one direction a place"
        if ranks == [1]
        else f"at {len(flat)} of {len(low)} places the spectrum is still flat at its end (last over first: {last:.2f})"
    )
    more = max(ranks) * 4
    return Finding(
        "rank_too_low",
        "The rank looks too low",
        f"The loss stopped falling at step {curve.plateau_step} of {facts.log.steps[-1].step if facts.log else 0}, at "
        f"{curve.final:.3g}, {rest:.0%} of where it began; {spectrum}.",
        f"Train with rank {more} (alpha {2 * more}), or with more targets. To be sure, before a long run: "
        f"deltaw diagnose RUN --try-rank {more} repeats these steps with that rank and compares.",
        tuple(r.name for r in flat[:20]),
    )


def _is_flat(row: SiteRow, rest: float) -> bool:
    """Whether a spectrum ends while it is flat; of two values less says so where much of the loss is left."""
    assert row.spectrum is not None
    least = FLAT / 2 if row.rank == 2 and rest >= MUCH_LEFT else FLAT
    return row.rank == 1 or row.spectrum.last >= least


def _tried(trial: Trial) -> Finding | None:
    if trial.gain < 3 * trial.noise or trial.gain < BETTER * trial.loss:
        return None
    if trial.other <= trial.rank:
        return None
    return Finding(
        "rank_too_low",
        "The rank is too low",
        f"The same {trial.steps} steps reach a loss of {trial.reached:.3g} with rank {trial.other} instead of "
        f"{trial.loss:.3g} with rank {trial.rank}: {trial.gain:.3g} less, with an uncertainty of {trial.noise:.2g}.",
        f"Train with rank {trial.other} (alpha in proportion), or with more targets.",
    )


def overfitting(facts: Facts) -> Finding | None:
    """Training loss falls on while the loss on validation rows rises."""
    log = facts.log
    evals = [e for e in log.evals if e.loss is not None and math.isfinite(e.loss)] if log else []
    if log is None or len(evals) < 2:
        return None
    best = min(evals, key=lambda e: e.loss or 0.0)
    last = evals[-1]
    assert best.loss is not None
    assert last.loss is not None
    if last.loss - best.loss < max(0.1 * best.loss, 0.05):
        return None
    width = max(1, len(log.steps) // 8)
    upto = [s.loss for s in log.steps if s.step <= best.step][-width:]
    end = [s.loss for s in log.steps][-width:]
    if not upto or statistics.fmean(end) > 0.9 * statistics.fmean(upto):
        return None
    return Finding(
        "overfitting",
        "The run learned its rows by heart",
        f"From step {best.step} to {last.step} the validation loss rose from {best.loss:.3g} to {last.loss:.3g}, "
        f"while the training loss fell from {statistics.fmean(upto):.3g} to {statistics.fmean(end):.3g}.",
        "Train for fewer steps, on more rows, or keep the best adapter (eval.keep: best, eval.patience).",
    )


def merge_precision(facts: Facts) -> Finding | None:
    """A number format whose rounding is of the size of the update."""
    lost = {name: r for name, r in facts.rounded.items() if r.energy and r.error >= SWALLOWED}
    if not lost:
        return None
    said = [
        f"{'as it was merged' if name == 'written' else f'merged in {name}'}, rounding has {r.error:.3g} times the "
        f"update's energy (under {SWALLOWED:g} is bearable); {r.lost:.0%} of the changed weights are the base's again"
        for name, r in lost.items()
    ]
    return Finding(
        "merge_precision",
        "A merge in this precision swallows the update",
        "; ".join(said) + ".",
        "Merge into the full-precision base and write it in float32 (deltaw merge --dtype float32), or serve the "
        "adapter on its base without merging.",
    )


def forgot(facts: Facts) -> Finding | None:
    """General ability that training on narrow data took away."""
    f = facts.forgetting
    if f is None:
        return None
    said = []
    before, after = f.perplexity_before, f.perplexity_after
    if before is not None and after is not None and after >= PERPLEXITY * before:
        said.append(f"perplexity on general text went from {before:.4g} to {after:.4g}")
    if f.n and f.right_before - f.right_after >= POINTS * f.n and f.chance < CHANCE:
        said.append(
            f"of {f.n} general questions {f.right_after} are answered right instead of {f.right_before} "
            f"(chance of that by luck: {f.chance:.2g})"
        )
    if not said:
        return None
    return Finding(
        "forgetting",
        "The base's general ability suffered: the data is too narrow",
        "With the adapter " + " and ".join(said) + ".",
        "Mix general rows into the training data, train for fewer steps or at a lower learning rate, or load the "
        "adapter only for the requests that it was made for.",
    )


def no_help(facts: Facts) -> Finding | None:
    """Rows on which the base alone is as good or better."""
    d = facts.data
    if d is None or d.before - d.after > 0.01 * abs(d.before):
        return None
    return Finding(
        "no_help",
        "The adapter does not help on these rows",
        f"The loss on {d.n} rows is {d.after:.4g} with the adapter and {d.before:.4g} without it.",
        "Check that base, adapter and rows belong together: an adapter that does nothing, or one on another base, "
        "looks like this.",
    )


RULES = (
    not_finite,
    no_update,
    base_mismatch,
    alpha_misconfigured,
    diverged,
    nothing_learned,
    rank_too_low,
    overfitting,
    merge_precision,
    forgot,
    no_help,
)
