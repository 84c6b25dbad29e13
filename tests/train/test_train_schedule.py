"""Which rows a step sees, and its learning rate."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from deltaw.train.optimizer import learning_rate
from deltaw.train.recipe import TrainSpec
from deltaw.train.schedule import Schedule

LENGTHS = [7, 3, 11, 5, 2, 9, 4, 8, 6, 13, 1, 10]


def spec(**settings: object) -> TrainSpec:
    return TrainSpec(**{"tokens_per_step": 20, **settings})


def all_rows(schedule: Schedule, steps: range) -> list[int]:
    return [row for step in steps for row in schedule.rows(step)]


def steps_of_one_epoch() -> int:
    return Schedule(LENGTHS, spec()).n_steps


def test_every_row_is_seen_once_an_epoch_in_another_order() -> None:
    n = steps_of_one_epoch()
    schedule = Schedule(LENGTHS, spec(epochs=3))
    ends = [s for s in range(1, schedule.n_steps + 1) if schedule.ends_epoch(s)]
    assert len(ends) == 3
    epochs = [all_rows(schedule, range(a, b)) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    for rows in epochs:
        assert sorted(rows) == list(range(len(LENGTHS)))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == all_rows(Schedule(LENGTHS, spec()), range(n))


def test_no_step_has_more_tokens_than_asked_unless_one_row_has() -> None:
    schedule = Schedule(LENGTHS, spec(epochs=4, tokens_per_step=12))
    for step in range(schedule.n_steps):
        rows = schedule.rows(step)
        assert sum(LENGTHS[r] for r in rows) <= 12 or len(rows) == 1


@pytest.mark.parametrize("epochs", [0.5, 1.5, 2.25])
def test_a_fraction_of_an_epoch_is_that_fraction_of_its_steps(epochs: float) -> None:
    whole = math.floor(epochs)
    n_whole = Schedule(LENGTHS, spec(epochs=whole)).n_steps if whole else 0
    n_next = Schedule(LENGTHS, spec(epochs=whole + 1)).n_steps - n_whole
    schedule = Schedule(LENGTHS, spec(epochs=epochs))
    assert schedule.n_steps == n_whole + max(1, round(n_next * (epochs - whole)))
    assert schedule.epochs_done(schedule.n_steps) == pytest.approx(whole + (schedule.n_steps - n_whole) / n_next)
    seen = Counter(all_rows(schedule, range(schedule.n_steps)))
    assert max(seen.values()) <= whole + 1
    assert min(seen[r] for r in range(len(LENGTHS))) >= whole


def test_a_tiny_fraction_is_one_step() -> None:
    assert Schedule(LENGTHS, spec(epochs=0.001)).n_steps == 1


def test_steps_may_go_beyond_an_epoch_or_end_inside_it() -> None:
    n = steps_of_one_epoch()
    assert Schedule(LENGTHS, spec(steps=n - 1)).n_steps == n - 1
    schedule = Schedule(LENGTHS, spec(steps=3 * n + 1, epochs=1))
    assert schedule.n_steps == 3 * n + 1
    seen = Counter(all_rows(schedule, range(schedule.n_steps)))
    assert min(seen.values()) >= 2
    assert len(seen) == len(LENGTHS)


def test_an_epoch_ends_at_its_last_step_and_at_the_end_of_the_run() -> None:
    n = steps_of_one_epoch()
    schedule = Schedule(LENGTHS, spec(steps=n + 1))
    assert [s for s in range(1, n + 2) if schedule.ends_epoch(s)] == [n, n + 1]
    assert schedule.epochs_done(0) == 0
    assert schedule.epochs_done(n) == 1


def test_the_order_depends_on_the_seed_alone() -> None:
    first = Schedule(LENGTHS, spec(seed=1))
    assert all_rows(first, range(first.n_steps)) == all_rows(
        Schedule(LENGTHS, spec(seed=1, lr=1e-2, micro_tokens=5)), range(first.n_steps)
    )
    other = Schedule(LENGTHS, spec(seed=2))
    assert all_rows(first, range(3)) != all_rows(other, range(3))


def test_warm_up_reaches_the_learning_rate_at_its_last_step() -> None:
    made = spec(lr=0.8, warmup_ratio=0.4, schedule="constant")
    rates = [learning_rate(step, 10, made) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8] + [0.8] * 6)


def test_no_warm_up_begins_at_the_learning_rate() -> None:
    for schedule in ("cosine", "linear", "hold", "constant"):
        assert learning_rate(0, 5, spec(lr=0.3, warmup_ratio=0, schedule=schedule)) == 0.3


def test_a_whole_run_of_warm_up_is_no_division_by_zero() -> None:
    made = spec(lr=1.0, warmup_ratio=1.0, schedule="hold")
    assert [learning_rate(s, 4, made) for s in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_warm_up_steps_are_not_one_more_by_rounding() -> None:
    # 0.07 * 100 is 7.000000000000001 in floating point: 7 steps, not 8
    assert learning_rate(6, 100, spec(lr=1.0, warmup_ratio=0.07, schedule="constant")) == 1.0


def test_linear_falls_evenly_to_the_final_ratio() -> None:
    made = spec(lr=1.0, warmup_ratio=0.2, final_lr_ratio=0.2, schedule="linear")
    rates = [learning_rate(step, 10, made) for step in range(10)]
    assert rates[:2] == pytest.approx([0.5, 1.0])
    assert rates[2:] == pytest.approx([1 - 0.8 * k / 8 for k in range(8)])
    assert learning_rate(10, 10, made) == pytest.approx(0.2)


def test_hold_falls_evenly_from_three_fifths_of_the_steps_on() -> None:
    made = spec(lr=2.0, warmup_ratio=0.1, final_lr_ratio=0.2, schedule="hold")
    rates = [learning_rate(step, 10, made) for step in range(11)]
    assert rates == pytest.approx([2.0] * 7 + [1.6, 1.2, 0.8, 0.4])
    late = spec(lr=2.0, warmup_ratio=0.8, schedule="hold")  # nothing is left to hold: it falls after the warm-up
    assert [learning_rate(step, 10, late) for step in (7, 8, 9, 10)] == pytest.approx([2.0, 2.0, 1.0, 0.0])


def test_cosine_is_the_cosine_to_the_final_ratio() -> None:
    made = spec(lr=2.0, warmup_ratio=0.2, final_lr_ratio=0.1, schedule="cosine")
    rates = [learning_rate(step, 10, made) for step in range(10)]
    assert rates[2] == pytest.approx(2.0)
    assert rates[6] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way
    assert rates[4] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.sqrt(0.5))))
    assert learning_rate(10, 10, made) == pytest.approx(0.2)
