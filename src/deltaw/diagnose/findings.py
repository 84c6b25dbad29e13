"""What is wrong, said in a sentence with the values found and what to do: one rule a kind of failure.

Every rule is a function of `Facts` and gives a `Finding` or None. The bands come from measured runs; docs/diagnosis.md
has the runs, the values and the reasons. A rule that lacks a fact stays silent: `diagnose` says which checks were not
made.
"""

from __future__ import annotations

import math
import statistics

from deltaw.diagnose.facts import PEAK, RISE, Facts, Finding, Trial
from deltaw.diagnose.precision import DTYPES
from deltaw.diagnose.scale import alpha_misconfigured
from deltaw.diagnose.sites import SiteRow

FLAT = 0.3  # last singular value over the first: more ends while it is flat
LEFT, MUCH_LEFT = 0.15, 0.25  # share of the first loss that is left where a rank that was too low stopped
MOVED = 0.15  # share of the first loss that must have been learned: else the rank is not what was missing
LATE = 0.95  # share of the learning rate after which a plateau is only the end of the schedule
ROUNDED = 0.5  # of 4 and 8 bits: energy of the rounding over that of the update
LOST, KEPT = 0.8, 0.5  # of 16 bits: weights that are the base's again; share of the update that is left
PERPLEXITY, POINTS, CHANCE = 1.25, 0.03, 0.01  # forgetting: ratio; drop of accuracy and the chance that it is luck
BETTER = 0.1  # share of the loss that a higher rank must save in the same steps


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


def diverged(facts: Facts) -> Finding | None:
    """A loss that ends above where it began, or gave back much of what it had learned; or a run that died of it."""
    curve, remedy = facts.curve, "Lower the learning rate or alpha, lengthen the warm-up"
    if (died := facts.died) is not None:
        return Finding("diverged", "The run blew up", f"{died[:1].upper()}{died[1:]}.", remedy + ".")
    if curve is None:
        return None
    first = max(curve.start, curve.means[0])
    worse = curve.final > first * 1.05 and curve.final - first > 3 * curve.noise
    if not worse and not (curve.has_risen and curve.rise >= RISE):
        return None
    return Finding(
        "diverged",
        "The loss rose",
        f"The loss began at {curve.start:.3g}, was {curve.best:.3g} at its best and ended at {curve.final:.3g}.",
        f"{remedy}, or keep the best adapter with rows to validate on (eval.keep: best).",
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
    """A number format in which the update is lost, or whose rounding is of the update's size."""
    said = []
    for name, r in facts.rounded.items():
        coarse = facts.written_in_bits if name == "written" else name not in DTYPES
        what = "as it was merged" if name == "written" else f"merged in {name}"
        if coarse and r.energy and r.error >= ROUNDED:
            said.append(f"{what}, rounding has {r.error:.3g} times the update's energy (under {ROUNDED:g} is bearable)")
        elif not coarse and r.energy and (r.lost >= LOST or r.kept < KEPT):
            left = "" if r.kept >= KEPT else f", and {max(0.0, r.kept):.0%} of the update is left"
            said.append(f"{what}, {r.lost:.0%} of the changed weights are the base's again{left}")
    if not said:
        return None
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
