"""Rounds of a loop that are not run take what the one before them took: no more is ever alive, and as much is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deltaw.ops.arena import Arena
from deltaw.ops.byrows import by_rows
from deltaw.ops.rounds import rounds, watched
from deltaw.plan.kept import Kept
from deltaw.plan.timeline import NAMES, Timeline
from deltaw.plan.trace import Tracer, traced
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from models import make_net

N, STEP = 103, 10


def test_rounds_are_the_parts_of_the_rows():
    for n, step in itertools.product((0, 1, 9, 10, 11), (1, 3, 10, 99)):
        assert [list(range(n))[at] for at in rounds(n, step)] == [
            list(range(n))[first : first + step] for first in range(0, n, step)
        ]


def plain(x: Tensor, seen: list[slice]) -> None:
    for at in rounds(len(x), STEP):
        seen.append(at)
        part = x[at].float() * 2
        total = part.sum()  # noqa: F841 - what a round leaves is freed in the next


def first_differs(x: Tensor, seen: list[slice]) -> None:
    total = x.sum()
    for at in rounds(len(x), STEP):
        seen.append(at)
        total = total + x[at].sum()


def keeps(x: Tensor, seen: list[slice]) -> None:
    kept = []
    for at in rounds(len(x), STEP):
        seen.append(at)
        kept.append(x[at].float())


def writes(x: Tensor, seen: list[slice]) -> None:
    y = torch.empty_like(x)
    for at in rounds(len(x), STEP):
        seen.append(at)
        torch.mul(x[at], 2, out=y[at])


def nested(x: Tensor, seen: list[slice]) -> None:
    for at in rounds(len(x), STEP):
        seen.append(at)
        part = x[at].double()
        for row in rounds(len(part), 2):
            one = part[row] + 1  # noqa: F841


def unlike(x: Tensor, seen: list[slice]) -> None:
    for at in rounds(len(x), STEP):
        seen.append(at)
        torch.empty(at.start + 1, dtype=x.dtype, device="meta")


def backward(x: Tensor, seen: list[slice]) -> None:
    def square(part: Tensor) -> Tensor:
        seen.append(slice(0, len(part)))
        return part.float().square().to(part.dtype)

    wide = x.repeat(1, 1 << 14).requires_grad_()
    by_rows(square, wide).sum().backward()


@pytest.mark.parametrize(
    ("work", "fewer"),
    [
        *((work, True) for work in (plain, first_differs, writes, nested, backward)),
        *((work, False) for work in (keeps, unlike)),
    ],
)
def test_a_few_rounds_take_what_all_take(work: Callable[[Tensor, list[slice]], None], fewer: bool):
    x = torch.empty(N, 4, dtype=torch.float16, device="meta")
    found = []
    for whole in (False, True):
        seen: list[slice] = []
        line = traced(lambda: work(x, seen), [x], [], 7, whole=whole)  # noqa: B023
        found.append((line, levels(line), len(seen)))
    (some, few_levels, few), (every, all_levels, many) = found
    assert (some.peak(), some.arena(), some.held()) == (every.peak(), every.arena(), every.held())
    assert set(few_levels) == set(all_levels)
    assert few_levels[-1:] == all_levels[-1:]
    assert few < many if fewer else few_levels == all_levels


def levels(line: Timeline) -> list[tuple[int, ...]]:
    """Bytes alive by name behind each event."""
    alive = dict.fromkeys(NAMES, 0)
    found = []
    for number, size in line.events.tolist():
        alive[NAMES[line.cause[number]]] += size
        found.append(tuple(alive.values()))
    return found


def test_what_an_arena_keeps_in_each_round_adds_up():
    arena = Arena()
    x = torch.empty(N, 4, dtype=torch.float16, device="meta")

    def work() -> None:
        for _ in rounds(len(x), STEP):
            arena.keep(8, 8, like=x)

    few, every = (traced(work, [x], [], 7, arena=arena, whole=whole).events.tolist() for whole in (False, True))
    assert few == every


def test_rounds_are_skipped_by_the_watcher_alone():
    x = torch.empty(N, 4, dtype=torch.float16, device="meta")
    tracer = Tracer([x])
    counts = []
    with tracer:
        for inside in (False, True):
            seen: list[slice] = []
            if inside:
                with watched(tracer):
                    writes(x, seen)
            else:
                writes(x, seen)
            counts.append(len(seen))
    assert counts == [11, 2]


def test_a_network_that_adapters_take_over_gives_the_plans_of_new_ones(tmp_path: Path):
    make_net("llama", num_hidden_layers=7).config.save_pretrained(tmp_path)
    recipes = [
        {"base": {"path": str(tmp_path), "dtype": "bfloat16", "format": form}, "adapter": adapter}
        for adapter in (
            {"method": "dora", "rank": 2},
            {"method": "lora", "rank": 3, "save_modules": ["norm"]},
            {"method": "ia3"},
            {"method": "lora", "rank": 5, "targets": ["q_proj"]},
            {"method": "bitfit", "add": True},
            {"method": "vera", "rank": 3},
            {"method": "longlora", "rank": 3, "save_modules": ["norm"]},
            {"method": "lora", "rank": 3},
        )
        for form in ("dense", "nf4")
    ]
    kept, work = Kept(), Work([(9, 4), (16, 15)], [(12, 11)])
    taken, new = (
        [Planner(load_recipe(r), work, 1, kept=of()).plan().plain() for r in recipes] for of in (lambda: kept, Kept)
    )
    assert taken == new
    assert len({id(p.model.net) for p in kept.models.values()}) == len(kept.models) < len(recipes)
