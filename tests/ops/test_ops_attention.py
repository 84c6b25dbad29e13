"""Attention over documents is its reference on every path, the reference is the definition, and nothing leaks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops import native
from deltaw.ops.attention import attend, attend_backward, attend_reference, attention, suits
from deltaw.ops.native import attention_calls, library

DTYPES = [torch.float32, torch.bfloat16]

# lengths, query heads, key-value heads, features, window
CASES = [
    ([1], 3, 1, 64, None),
    ([1, 1, 1], 1, 1, 96, None),
    ([2, 3, 85, 17], 6, 2, 64, None),
    ([2, 3, 85, 17], 2, 2, 16, 5),
    ([256, 256], 3, 1, 64, None),
    ([700], 3, 1, 16, None),
    ([300, 40], 2, 1, 32, 70),
    ([130, 70], 2, 2, 80, None),
    ([130, 70], 4, 1, 128, 33),
    ([90], 2, 1, 256, None),
    ([65, 64], 2, 1, 12, None),
    ([33, 50], 2, 1, 7, 1),
    ([0, 20, 0, 0, 9, 0], 2, 1, 48, None),
]


def made(case: tuple, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """(bounds, [q, k, v, g]): q, k and v are views of one buffer."""
    lengths, heads, shared, dim, _ = case
    tokens = sum(lengths)
    rng = torch.Generator().manual_seed(seed)
    buffer = torch.randn(tokens, (heads + 2 * shared) * dim, generator=rng).to(dtype)
    rows = [t.view(tokens, -1, dim) for t in buffer.split([heads * dim, shared * dim, shared * dim], 1)]
    g = torch.randn(tokens, heads, dim, generator=rng).to(dtype)
    return torch.tensor([0, *itertools.accumulate(lengths)]), [*rows, g]


def all_of(
    bounds: Tensor, rows: list[Tensor], scale: float, window: int | None = None, fronts: Tensor | None = None
) -> list[Tensor]:
    """[o, lse, dq, dk, dv]"""
    q, k, v, g = rows
    o, lse = attend(q, k, v, bounds, scale, window=window, fronts=fronts)
    return [o, lse, *attend_backward(g, q, k, v, o, lse, bounds, scale, window=window, fronts=fronts)]


def compare(got: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> None:
    # float32: sums of up to 700 terms of order 1; bfloat16: P, dS and the results have 8 bits
    atol, rtol = (2e-5, 0.0) if dtype == torch.float32 else (2e-2, 1e-2)
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert a.dtype == (torch.float32 if i == 1 else dtype)
        torch.testing.assert_close(a.double(), b, rtol=0 if i == 1 else rtol, atol=2e-5 if i == 1 else atol)


def by_definition(
    rows: list[Tensor], bounds: Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """One score matrix over the whole pack, most of it hidden."""
    q, k, v = (t.transpose(0, 1) for t in rows)
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(q.shape[1])
    document = torch.bucketize(place, bounds, right=True)
    behind = place[:, None] - place[None, :]
    seen = (document[:, None] == document[None, :]) & (behind >= 0) & (behind < (window or len(place)))
    scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


# The reference ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_the_reference_is_the_definition_and_its_backward_its_derivative(window, softcap):
    bounds, (q, k, v, _) = made(([3, 0, 1, 6], 4, 2, 5, None), torch.float64)
    o, lse = attend_reference(q, k, v, bounds, 0.7, window=window, softcap=softcap)
    wanted = by_definition([q, k, v], bounds, 0.7, window, softcap)
    for got, want in zip((o, lse), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)  # float64, 6 terms
    leaves = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, bounds, 0.7, window, softcap), leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_softcap_goes_by_the_reference(dtype):
    bounds, rows = made(([9, 20], 2, 1, 16, None), dtype)
    assert not suits(*rows[:3], 0.3, 2.0)
    o, lse = attend(*rows[:3], bounds, 0.3, softcap=2.0, window=4)
    exact = by_definition([t.double() for t in rows[:3]], bounds, 0.3, 4, 2.0)
    compare([o, lse], list(exact), dtype)


# Every path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_is_the_reference_in_float64(case, dtype, any_path):
    bounds, rows = made(case, dtype)
    assert suits(*rows[:3], 0.2) == (any_path != "reference")
    scale = 1.3 * case[3] ** -0.5
    compare(all_of(bounds, rows, scale, case[4]), all_of(bounds, [t.double() for t in rows], scale, case[4]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_do_not_overflow_and_pick_one_value(dtype, any_path):
    bounds, (q, k, v, g) = made(([150], 2, 1, 64, None), dtype)
    rows = [100 * q, 100 * k, v, g]  # scores in the tens of thousands: one probability is 1
    got, exact = all_of(bounds, rows, 1.0), all_of(bounds, [t.double() for t in rows], 1.0)
    assert all(bool(t.isfinite().all()) for t in got)
    compare(got[:1], exact[:1], dtype)
    torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_give_what_copies_give_and_gradients_land_in_one_buffer(dtype, any_path):
    case = ([85, 2, 40], 6, 2, 20, None)
    bounds, rows = made(case, dtype)
    wanted = all_of(bounds, [t.clone() for t in rows], 0.2)
    for got, want in zip(all_of(bounds, rows, 0.2), wanted, strict=True):
        assert got.equal(want)
    swapped = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in rows]  # heads first in memory
    for got, want in zip(all_of(bounds, swapped, 0.2), wanted, strict=True):
        assert got.equal(want)
    wide = torch.full((127, 6 * 20 + 4 * 20 + 3), 7.0, dtype=dtype)
    views = tuple(t.view(127, -1, 20) for t in wide[:, 1:-2].split([120, 40, 40], 1))
    o = torch.empty(127, 6, 20, dtype=dtype)
    found, lse = attend(*rows[:3], bounds, 0.2, out=o)
    assert found is o
    attend_backward(rows[3], *rows[:3], o, lse, bounds, 0.2, out=views)
    for got, want in zip((o, lse, *views), wanted, strict=True):
        assert got.equal(want)
    assert bool((wide[:, :1] == 7).all() and (wide[:, -2:] == 7).all()), "nothing beside the views is written"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[60, 70, 3], [260]], ids=["short", "long"])
def test_gradients_may_replace_the_inputs(lengths, dtype, any_path):
    bounds, (q, k, v, g) = made((lengths, 6, 2, 32, None), dtype)
    o, lse, *wanted = all_of(bounds, [q, k, v, g], 0.2)
    copies = [t.clone() for t in (q, k, v)]
    found = attend_backward(g, q, k, v, o, lse, bounds, 0.2, out=(q, k, v))
    assert found[0] is q
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))
    attend_backward(g, *copies, o, lse, bounds, 0.2, out=(g, *copies[1:]))
    assert g.equal(wanted[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[200], [200, 9, 30, 30, 30, 30]], ids=["one", "several"])
def test_the_number_of_threads_changes_no_bit(lengths, dtype, any_path):
    """A document that is long beside the others is split by heads among two threads and not by one."""
    bounds, rows = made((lengths, 6, 2, 64, None), dtype)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(all_of(bounds, rows, 0.2))
    finally:
        torch.set_num_threads(before)
    if any_path == "reference":  # torch's own products: the same within rounding
        compare([t.float() for t in results[1]], [t.double() for t in results[0]], torch.float32)
        return
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(other, results[0], strict=True))


# Documents that go on from a front -----------------------------------------------------------------------------------

# lengths, query heads, key-value heads, features, window; fronts
FOLLOWING = [
    (([1, 1, 2], 2, 1, 16, None), [-1, 0, 0]),
    (([13, 24, 25, 3, 40], 3, 1, 64, None), [-1, 0, 0, 0, 0]),
    (([24, 13, 25, 60, 33, 8, 0], 6, 2, 32, None), [1, -1, 1, -1, 3, 1, 1]),
    (([65, 130, 64, 63, 300], 2, 2, 80, None), [-1, 0, 0, 0, -1]),
    (([17, 90, 3, 70], 4, 1, 128, 33), [-1, 0, 0, 0]),
    (([260, 5, 1, 70, 9], 3, 1, 48, None), [-1, 0, 0, 0, 0]),
    (([19, 300, 200], 2, 1, 7, None), [-1, 0, 0]),
]


def by_copies(case: tuple, fronts: list[int], rows: list[Tensor], scale: float) -> list[Tensor]:
    """What `all_of` gives in float64 where each document has a copy of its front, whose gradients are added up."""
    bounds = list(itertools.accumulate(case[0], initial=0))
    own = [torch.arange(a, b) for a, b in itertools.pairwise(bounds)]
    whole = [o if f < 0 else torch.cat([own[f], o]) for o, f in zip(own, fronts, strict=True)]
    at = torch.cat(whole)
    is_own = torch.cat([torch.arange(len(w)) >= len(w) - len(o) for w, o in zip(whole, own, strict=True)])
    q, k, v, g = (t.double()[at] for t in rows)
    ends = torch.tensor([0, *itertools.accumulate(len(w) for w in whole)])
    o, lse, dq, dk, dv = all_of(ends, [q, k, v, g * is_own[:, None, None]], scale, case[4])
    order = at[is_own].argsort()
    sums = [torch.zeros(bounds[-1], *t.shape[1:], dtype=torch.float64).index_add_(0, at, t) for t in (dq, dk, dv)]
    return [o[is_own][order], lse[:, is_own][:, order], *sums]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "fronts"), FOLLOWING, ids=str)
def test_what_follows_a_front_sees_it_as_if_it_had_a_copy(case, fronts, dtype, any_path):
    bounds, rows = made(case, dtype)
    scale = 1.3 * case[3] ** -0.5
    got = all_of(bounds, rows, scale, case[4], torch.tensor(fronts))
    compare(got, by_copies(case, fronts, rows, scale), dtype)
    copies = [t.clone() for t in rows]
    o, lse = attend(*copies[:3], bounds, scale, window=case[4], fronts=torch.tensor(fronts))
    places = (copies[3], *copies[1:3])
    attend_backward(
        copies[3], *copies[:3], o, lse, bounds, scale, window=case[4], fronts=torch.tensor(fronts), out=places
    )
    assert all(a.equal(b) for a, b in zip(places, got[2:], strict=True)), "gradients may replace the inputs"


@pytest.mark.parametrize(("case", "fronts"), FOLLOWING, ids=str)
def test_the_number_of_threads_changes_no_bit_behind_a_front(case, fronts):
    bounds, rows = made(case, torch.bfloat16)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(all_of(bounds, rows, 0.2, case[4], torch.tensor(fronts)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("fronts", [[0, -1, 0], [-1, 3, 0], [-1, 0, 1], [-1, -2, 0], [1, -1, -1]], ids=str)
def test_fronts_that_are_none_are_refused(fronts, any_path):
    bounds, rows = made(([9, 0, 31], 2, 1, 16, None), torch.float32)
    with pytest.raises(ShapeError, match="goes on from"):
        attend(*rows[:3], bounds, 0.3, fronts=torch.tensor(fronts))
    with pytest.raises(ShapeError, match="int64"):
        attend(*rows[:3], bounds, 0.3, fronts=torch.tensor([-1, -1]))


# What a token sees --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_comes_from_other_documents_or_from_behind(dtype, any_path):
    bounds, rows = made(([40, 90, 20], 2, 1, 32, None), dtype)
    first = all_of(bounds, rows, 0.2)
    changed = [t.clone() for t in rows]
    for t in changed:
        t[100:] = 3.0  # the end of the second document, and the third
    second = all_of(bounds, changed, 0.2)
    assert first[0][:100].equal(second[0][:100])
    assert first[1][:, :100].equal(second[1][:, :100])
    assert all(a[:40].equal(b[:40]) for a, b in zip(first[2:], second[2:], strict=True))
    assert first[2][:100].equal(second[2][:100]), "dq of a token knows nothing of what follows"
    assert not first[3][40:100].equal(second[3][40:100])


def test_what_is_not_a_number_stays_visible_where_it_is_seen(any_path):
    bounds, rows = made(([20, 70], 2, 1, 32, None), torch.float32)
    rows[1][50, 0, 3] = float("nan")
    o, lse, *_ = all_of(bounds, rows, 0.2)
    assert bool(o[50:].isnan().all() and lse[:, 50:].isnan().all())
    assert not bool(o[:50].isnan().any())


@pytest.mark.parametrize("window", [1, 17, 64])
def test_a_window_is_what_is_left_when_the_rest_is_gone(window, any_path):
    bounds, rows = made(([150], 2, 1, 32, None), torch.float32)
    o, lse = attend(*rows[:3], bounds, 0.2, window=window)
    for i in (0, window - 1, 63, 64, 149):
        near = slice(max(0, i - window + 1), i + 1)
        alone, of_it = attend(*(t[near] for t in rows[:3]), torch.tensor([0, near.stop - near.start]), 0.2)
        torch.testing.assert_close(o[i], alone[-1], rtol=0, atol=2e-6)  # the same terms in another order
        torch.testing.assert_close(lse[:, i], of_it[:, -1], rtol=0, atol=2e-6)


# As an operation of autograd -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd_gives_the_gradients_of_the_definition(dtype, any_path):
    bounds, (q, k, v, g) = made(([9, 31], 6, 2, 16, None), dtype)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    o = attention(*leaves, bounds, 0.3, 7)
    wanted = by_definition(exact, bounds, 0.3, 7, None)[0]
    found = torch.autograd.grad(o, leaves, g)
    for got, want in zip((o, *found), (wanted, *torch.autograd.grad(wanted, exact, g.double())), strict=True):
        atol = 2e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), want, rtol=0 if dtype == torch.float32 else 1e-2, atol=atol)


def test_a_gradient_without_memory_of_its_own_is_read(any_path):
    bounds, (q, k, v, _) = made(([9, 31], 2, 1, 16, None), torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    attention(*leaves, bounds, 0.3).sum().backward()  # ones, expanded
    ones = torch.ones(40, 2, 16)
    wanted = all_of(bounds, [q, k, v, ones], 0.3)[2:]
    assert all(a.grad.equal(b) for a, b in zip(leaves, wanted, strict=True))


def test_meta_tensors_have_shapes_only(any_path):
    bounds, rows = made(([9, 31], 2, 1, 16, None), torch.bfloat16)
    if any_path == "reference":
        assert not suits(*rows[:3], 0.3)
        return
    o, lse, *found = all_of(bounds, [t.to("meta") for t in rows], 0.3)
    assert [t.shape for t in (o, lse)] == [(40, 2, 16), (2, 40)]
    assert [t.shape for t in found] == [t.shape for t in rows[:3]]
    assert lse.dtype == torch.float32


# Refused -------------------------------------------------------------------------------------------------------------


def test_shapes_that_do_not_belong_together_are_refused():
    bounds, (q, k, v, _) = made(([9, 31], 6, 2, 16, None), torch.float32)
    for rows in ((q[:, :5], k, v), (q, k[:-1], v[:-1]), (q, k, v[..., :8]), (q[..., :8], k, v), (q[0], k, v)):
        with pytest.raises(ShapeError, match="belong together"):
            attend(*rows, bounds, 0.3)


@pytest.mark.parametrize("values", [[0, 9, 39], [1, 9, 40], [0, 41, 40], [0, 30, 9, 40], []], ids=str)
def test_bounds_that_are_none_are_refused(values, any_path):
    _, rows = made(([9, 31], 2, 1, 16, None), torch.float32)
    with pytest.raises(ShapeError, match="ascend from 0 to 40"):
        attend(*rows[:3], torch.tensor(values, dtype=torch.int64), 0.3)
    with pytest.raises(ShapeError, match="int64"):
        attend(*rows[:3], torch.tensor([0.0, 40.0]), 0.3)


def test_the_kernel_refuses_what_it_could_not_read_safely():
    if not native.available():
        assert library.running() is None
        return
    bounds, (q, k, v, _) = made(([9, 31], 2, 1, 16, None), torch.float32)
    good = attention_calls.Setting(bounds, 0.3)
    o, lse = torch.empty_like(q), torch.empty(2, 40)
    for bad in (
        (q.half(), k.half(), v.half(), good, o.half(), lse),
        (q, k.bfloat16(), v, good, o, lse),
        (q, k, v[:, :, ::2], good, o, lse),
        (q, k, v, good, o[:-1], lse),
        (q, k, v, good, o, lse[:1]),
        (q, k, v, good, o, lse.double()),
        (q.to("meta"), k, v, good, o, lse),
        (q[:, :, :0], k[:, :, :0], v[:, :, :0], good, o[:, :, :0], lse),
    ):
        with pytest.raises(ShapeError):
            attention_calls.attend(*bad)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [c for c in CASES if c[3] % 8 == 0 and 0 not in c[0]], ids=str)
def test_attention_on_a_gpu_is_its_reference(case):
    bounds, rows = made(case, torch.bfloat16)
    wanted = all_of(bounds, [t.double() for t in rows], 0.3, case[4])
    there = [t.cuda() for t in rows]
    assert suits(*there[:3], 0.3)
    for found, exact in zip(all_of(bounds, there, 0.3, case[4]), wanted, strict=True):  # o, lse, dq, dk, dv
        assert float((found.cpu().double() - exact).norm() / exact.norm().clamp(min=1e-3)) < 1e-2
