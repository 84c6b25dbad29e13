"""What a pack needs is every row that its targets depend on, once, and the targets find it."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from deltaw.data.needed import alike, common_rows, needed
from deltaw.data.pack import Batch, collate
from deltaw.data.template import Example


def seen(batch: Batch) -> list[tuple[tuple[int, ...], int, int]]:
    """Of each target: all that its place sees, the position of that place, and the target."""
    bounds, ids, positions = batch.bounds.tolist(), batch.input_ids.tolist(), batch.positions.tolist()
    fronts = [-1] * batch.n_docs if batch.fronts is None else batch.fronts.tolist()
    found = []
    for at, target in zip(batch.predict_at.tolist(), batch.target_ids.tolist(), strict=True):
        doc = next(d for d in range(batch.n_docs) if bounds[d] <= at < bounds[d + 1])
        rows = list(range(bounds[doc], at + 1))
        if (front := fronts[doc]) >= 0:
            rows = [*range(bounds[front], bounds[front + 1]), *rows]
        assert [positions[r] for r in rows] == list(range(len(rows)))
        found.append((tuple(ids[r] for r in rows), positions[at], target))
    return found


def made(seed: int) -> list[Example]:
    """Documents with targets anywhere, or nowhere, many of which begin alike."""
    rng = random.Random(seed)
    found = []
    for _ in range(rng.randint(1, 9)):
        ids = [rng.randint(1, 2) for _ in range(rng.randint(1, 12))]
        flags = [i > 0 and rng.random() < 0.3 for i in range(len(ids))]
        found.append(Example(tuple(ids), tuple(flags), "row"))
    return found


def test_data_needed_is_what_targets_see() -> None:
    with_fronts = 0
    for seed in range(300):
        batch = collate(made(seed))
        for fronts in (True, False):
            less = needed(batch, fronts=fronts)
            assert seen(less) == seen(batch)
            assert less.n_tokens <= batch.n_tokens
            assert less.predict_at.tolist() == sorted(set(less.predict_at.tolist()))
            assert fronts or less.fronts is None
        with_fronts += needed(batch).fronts is not None
    assert with_fronts > 100


def test_data_needed_by_hand() -> None:
    alone = Example((7, 8, 5, 6), (False, False, True, False), "one")
    rows = [
        Example((1, 2, 3, 4, 9), (False, False, False, True, True), "two"),
        Example((3, 3), (False, False), "no target"),
        alone,
        Example((1, 2, 3, 5, 9, 2), (False, False, False, False, True, False), "three"),
    ]
    less = needed(collate(rows))
    assert less.input_ids.tolist() == [1, 2, 3, 4, 7, 8, 3, 5]
    assert less.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert less.bounds.tolist() == [0, 2, 4, 6, 8]
    assert less.fronts is not None
    assert less.fronts.tolist() == [-1, 0, -1, 0]
    assert less.predict_at.tolist() == [2, 3, 5, 7]
    assert less.target_ids.tolist() == [4, 9, 5, 9]


def test_data_needed_leaves_a_pack_that_needs_all() -> None:
    whole = collate([Example((1, 2, 3), (False, True, True), ""), Example((1, 2), (False, True), "")])
    cut = needed(whole)
    assert cut.input_ids.tolist() == [1, 2, 1], "a last target is not read"
    assert needed(cut) is cut
    none = collate([Example((1, 2, 3), (False,) * 3, "")])
    assert needed(none) is none


def test_data_needed_fronts_must_be_worth_it() -> None:
    long = [Example((1, *range(2, 200)), (False,) * 100 + (True,) * 99, "")]
    other = [Example((1, *range(300, 499)), (False,) * 100 + (True,) * 100, "")]
    assert needed(collate(long + other)).fronts is None, "one row of 399"
    both = needed(collate(long + long))
    assert both.fronts is not None
    assert both.n_tokens == 99 + 2 * 99


@pytest.mark.parametrize("seed", range(20))
def test_data_needed_groups_save_most(seed: int) -> None:
    """Against every partition of up to six heads."""
    rng = random.Random(seed)
    heads = [tuple(rng.randint(1, 2) for _ in range(rng.randint(0, 6))) for _ in range(rng.randint(1, 6))]

    def common(members: tuple[int, ...]) -> int:
        columns = itertools.takewhile(lambda c: len(set(c)) == 1, zip(*(heads[m] for m in members), strict=False))
        return sum(1 for _ in columns)

    def best(left: tuple[int, ...]) -> int:
        if not left:
            return 0
        first, rest = left[0], left[1:]
        cuts = [c for n in range(len(rest) + 1) for c in itertools.combinations(rest, n)]
        return max(len(c) * common((first, *c)) + best(tuple(r for r in rest if r not in c)) for c in cuts)

    groups = alike(heads)
    assert sum((len(m) - 1) * length for m, length in groups) == best(tuple(range(len(heads))))
    assert all(length == common(tuple(m)) and len(m) > 1 and length for m, length in groups)
    assert len({m for g, _ in groups for m in g}) == sum(len(g) for g, _ in groups)


def test_data_needed_common_rows() -> None:
    rows = [Example((1, 2, 3, 4), (False,) * 3 + (True,), ""), Example((1, 2, 9), (False, False, True), "")]
    assert common_rows(rows) == 1, "the second's place 1 predicts"
    assert common_rows([*rows, Example((5,), (False,), "")]) == 1
    assert common_rows([Example((1, 2), (False, True), "")]) == 0
    assert common_rows([]) == 0
    torch.testing.assert_close(needed(collate(rows)).positions[:1], torch.tensor([0]))
