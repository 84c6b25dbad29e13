"""The rule on alpha and the learning rate: steps far too large or far too small.

The measure is how far one step of Adam can turn a row of a weight: the learning rate times `SiteRow.reach`. It holds
for any rank, scale and model; the loss is the second witness. docs/diagnosis.md has the runs that the bands come from.
"""

from __future__ import annotations

from deltaw.diagnose.curve import Curve
from deltaw.diagnose.facts import PEAK, RISE, Facts, Finding

STEP = 0.02  # of a weight's row that one step can turn it by
LARGE, HUGE = 0.05, 3.0  # update norm over weight norm
SCALE = (0.25, 16.0)  # alpha / rank that is usual
WILD_SCALE = 32.0
SMALL_TURN = 1e-3  # of a weight's row that all steps together can turn it by
SLOW_TURN = (3e-3, 1e-2)  # the same where the loss barely moved: with a usual scale, with an unusual one
BARELY = 0.1  # of the first loss: less was learned
STEP_ALONE = (5e-5, 2e-2)  # scale * learning rate, where no base is there to compare with


def alpha_misconfigured(facts: Facts) -> Finding | None:
    """Steps far too large or too small: scale times learning rate against the weights, with the loss as witness."""
    return _too_large(facts) or _too_small(facts)


def _too_large(facts: Facts) -> Finding | None:
    ratio, step, curve = facts.median(lambda r: r.ratio), _step(facts), facts.curve
    wild = facts.scale is not None and abs(facts.scale) >= WILD_SCALE
    witness = [d for d in (facts.died,) if d] if curve is None else _loss_says(curve)
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
