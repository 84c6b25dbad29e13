"""Packing loses nothing and mixes nothing: every document, position and target once."""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from made_tokenizers import shipped

from deltaw.data import DataSpec, Example, collate, encode_all, plan_epoch, read_rows, split_micro
from deltaw.errors import DataError


def example(ids: list[int], targets: list[int]) -> Example:
    return Example(tuple(ids), tuple(i in targets for i in range(len(ids))), "rows line 1")


def test_three_documents_are_packed_with_their_bounds():
    batch = collate([example([7, 8, 9], [2]), example([5], []), example([4, 3, 2, 1], [1, 3])])
    expected = {
        "input_ids": [7, 8, 9, 5, 4, 3, 2, 1],
        "positions": [0, 1, 2, 0, 0, 1, 2, 3],
        "bounds": [0, 3, 4, 8],
        "predict_at": [1, 4, 6],
        "target_ids": [9, 3, 1],
    }
    assert {field.name for field in fields(batch)} == expected.keys() | {"fronts"}
    for name, values in expected.items():
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(batch, name).tolist() == values
    assert batch.fronts is None
    assert (batch.n_tokens, batch.n_targets, batch.n_docs) == (8, 3, 3)


def test_a_batch_without_targets_has_empty_tensors():
    batch = collate([example([7, 8], [])])
    assert (batch.predict_at.shape, batch.target_ids.shape) == ((0,), (0,))
    assert batch.target_ids.dtype == torch.int64


def test_an_example_cannot_have_its_first_token_as_target():
    with pytest.raises(AssertionError):
        example([1, 2], [0])
    with pytest.raises(AssertionError):
        Example((1, 2), (False,), "rows line 1")


def test_every_target_of_an_epoch_is_predicted_once_from_its_own_document(bpe):
    encoded = encode_all(read_rows(shipped("address_json", "valid")), bpe, DataSpec(max_tokens=90))
    assert encoded.n_cut > 0
    expected = sorted(
        (index, i) for index, one in enumerate(encoded.examples) for i, flag in enumerate(one.is_target) if flag
    )
    seen = []
    for step in plan_epoch(encoded.lengths, 400, seed=3, epoch=1):
        for micro in split_micro(step, encoded.lengths, 200):
            batch = collate([encoded.examples[index] for index in micro])
            assert batch.bounds.tolist() == [sum(encoded.lengths[j] for j in micro[:d]) for d in range(len(micro) + 1)]
            for at, target in zip(batch.predict_at.tolist(), batch.target_ids.tolist(), strict=True):
                d = int(torch.searchsorted(batch.bounds, at, right=True)) - 1
                i = at + 1 - int(batch.bounds[d])
                assert batch.positions[at] == i - 1
                assert encoded.examples[micro[d]].input_ids[i] == target == batch.input_ids[at + 1]
                seen.append((micro[d], i))
    assert sorted(seen) == expected
    assert len(seen) == encoded.n_targets


def slow_plan(order: list[int], lengths: list[int], limit: int) -> list[list[int]]:
    steps, step = [], []
    for index in order:
        if step and sum(lengths[i] for i in step) + lengths[index] > limit:
            steps.append(step)
            step = []
        step.append(index)
    return [*steps, step] if step else steps


def test_an_unshuffled_plan_is_filled_in_order_and_a_long_document_is_alone():
    assert plan_epoch([3, 4, 3, 20, 5, 5, 1], 10, seed=0, epoch=0, shuffle=False) == [
        [0, 1, 2],
        [3],
        [4, 5],
        [6],
    ]


def test_any_plan_covers_every_index_once_within_its_budget():
    draw = random.Random(1)
    for seed in range(30):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 80))]
        plan = plan_epoch(lengths, 100, seed=seed, epoch=seed % 3)
        order = [index for step in plan for index in step]
        assert sorted(order) == list(range(len(lengths)))
        assert all(step for step in plan)
        assert plan == slow_plan(order, lengths, 100)


def test_a_plan_depends_on_seed_and_epoch_alone():
    lengths = [5] * 50
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = plan_epoch(lengths, 20, seed=0, epoch=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert plan_epoch(lengths, 20, seed=0, epoch=0) == first
    others = [plan_epoch(lengths, 20, seed=seed, epoch=epoch) for seed, epoch in ((0, 1), (1, 0), (1, 1), (-1, 0))]
    assert all(plan != first for plan in others)
    assert others[0] != others[1]  # seed 0 in epoch 1 is not seed 1 in epoch 0


def test_the_order_of_a_seed_and_an_epoch_does_not_move():
    assert plan_epoch([1] * 8, 3, seed=7, epoch=2) == [[5, 4, 0], [7, 1, 6], [3, 2]]


def test_no_examples_make_no_steps():
    assert plan_epoch([], 10, seed=0, epoch=0) == []
    assert split_micro([], [], 10) == []
    assert split_micro([], [], None) == []


def test_micro_batches_hold_like_lengths_within_their_budget():
    lengths = [9, 2, 7, 2, 50, 4, 6]
    assert split_micro([6, 4, 3, 0, 1], lengths, None) == [[3, 1, 6, 0, 4]]
    assert split_micro([6, 4, 3, 0, 1], lengths, 12) == [[3, 1, 6], [0], [4]]
    assert split_micro([6, 4, 3, 0, 1], lengths, 19) == [[3, 1, 6, 0], [4]]


@pytest.mark.parametrize("limit", [0, -3])
def test_a_budget_of_no_tokens_is_refused(limit):
    with pytest.raises(DataError, match=f"tokens_per_step must be at least 1, found {limit}"):
        plan_epoch([1], limit, seed=0, epoch=0)
    with pytest.raises(DataError, match=f"micro_tokens must be at least 1, found {limit}"):
        split_micro([0], [1], limit)
