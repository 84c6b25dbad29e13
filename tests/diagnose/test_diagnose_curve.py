"""Curves that are known: falling, flat early, rising, thrown off; and logs as runs leave them."""

from __future__ import annotations

import json
import math
import random

import pytest

from deltaw.diagnose.curve import StepPoint, read_curve, read_log
from deltaw.errors import RunError


def steps(losses: list[float], cosine: bool = True) -> tuple[StepPoint, ...]:
    n = len(losses)
    rate = [0.5e-3 * (1 + math.cos(math.pi * i / n)) if cosine else 1e-3 for i in range(n)]
    return tuple(StepPoint(i + 1, loss, rate[i], 1.0, i / n) for i, loss in enumerate(losses))


def noisy(shape, n: int = 160, noise: float = 0.05) -> list[float]:
    rng = random.Random(5)
    return [shape(i / n) + rng.gauss(0, noise) for i in range(n)]


def test_diagnose_curve_that_falls_to_its_end():
    found = read_curve(steps(noisy(lambda t: 4 - 3 * t), cosine=False))
    assert found is not None
    assert found.has_fallen
    assert found.plateau_step is None
    assert not found.has_risen
    assert found.start == pytest.approx(4, abs=0.1)
    assert found.final == pytest.approx(4 - 3 * 0.875, abs=0.05)
    assert found.moved == pytest.approx(1 - found.final / found.start)
    assert found.noise == pytest.approx(0.05 / math.sqrt(20), rel=0.3)


def test_diagnose_curve_that_is_flat_from_a_quarter_on():
    found = read_curve(steps(noisy(lambda t: max(1.5, 4 - 10 * t)), cosine=False))
    assert found is not None
    assert found.plateau_step in (60, 80)  # the end of the third or of the fourth eighth
    assert found.plateau_lr == pytest.approx(found.plateau_step / 160)
    assert found.final == pytest.approx(1.5, abs=0.05)


def test_diagnose_curve_spent_rate_is_of_the_schedule():
    found = read_curve(steps(noisy(lambda t: max(1.5, 4 - 10 * t))))
    assert found is not None
    assert found.plateau_lr > found.plateau_step / 160 + 0.1  # a cosine spends its rate early


def test_diagnose_curve_that_rises_and_one_that_was_thrown_off():
    up = read_curve(steps(noisy(lambda t: 4 - 6 * t if t < 0.5 else 1 + 3 * (t - 0.5))))
    assert up is not None
    assert up.has_risen
    assert 0.2 < up.rise < 0.6
    assert up.peak < 1.1
    off = read_curve(steps(noisy(lambda t: 2 if t == 0 else 9 * math.exp(-8 * t) + 1)))
    assert off is not None
    assert off.peak > 3
    assert not off.has_risen
    still = read_curve(steps(noisy(lambda t: 3.0)))
    assert still is not None
    assert not still.has_fallen
    assert not still.has_risen


def test_diagnose_curve_needs_enough_finite_steps():
    assert read_curve(steps([2.0] * 15)) is None
    assert read_curve(steps([2.0] * 15 + [math.nan])) is None
    assert read_curve(steps([2.0] * 16)) is not None


def event(step: int, loss: float) -> str:
    return json.dumps({"event": "step", "step": step, "loss": loss, "lr": 0.1, "grad_norm": 1.0, "epoch": 0.5})


def test_diagnose_curve_reads_logs_of_killed_and_resumed_runs(tmp_path):
    assert read_log(tmp_path) is None
    start = json.dumps({"event": "start", "n_steps": 9, "rows": 5})
    old = {"event": "eval", "step": 2, "metric": "exact", "value": 0.5, "loss": None, "is_best": True}
    lines = [start, event(1, 3.0), event(2, 2.0), start, event(2, 2.5), json.dumps(old), '{"event": "st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    log = read_log(tmp_path)
    assert log is not None
    assert [s.loss for s in log.steps] == [3.0, 2.5]
    assert (log.n_steps, log.rows, log.finished) == (9, 5, False)
    assert log.evals[0].loss is None
    (tmp_path / "metrics.jsonl").write_text("\n".join([start, "not an event", event(1, 3.0)]))
    with pytest.raises(RunError, match=r"metrics\.jsonl:2 is no event"):
        read_log(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"event": "step", "step": 1}\n')
    with pytest.raises(RunError, match="loss"):
        read_log(tmp_path)
