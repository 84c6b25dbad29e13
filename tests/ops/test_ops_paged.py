"""Attention over pages and products of few rows, compiled, against their plain forms."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ShapeError
from deltaw.ops.native import library
from deltaw.ops.paged import (
    Places,
    few_rows,
    few_rows_reference,
    paged_attention,
    paged_attention_reference,
)

PAGES = 90


def _places(spans: list[tuple[int, int]], seed: int) -> Places:
    """Sequences of (context, rows), in pages drawn without order; pages behind a sequence's last are nonsense."""
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(PAGES, generator=rng).tolist()
    width = max(-(-(c + n) // 16) for c, n in spans) + 2
    tables = torch.full((len(spans), width), 2**30, dtype=torch.int32)
    slots: list[int] = []
    for s, (context, n) in enumerate(spans):
        for p in range(-(-(context + n) // 16)):
            tables[s, p] = drawn.pop()
        slots += [int(tables[s, at // 16]) * 16 + at % 16 for at in range(context, context + n)]
    bounds = torch.tensor([0, *(n for _, n in spans)]).cumsum(0)
    return Places(torch.tensor(slots), bounds, torch.tensor([c for c, _ in spans]), tables)


def _case(heads: int, shared: int, dim: int, places: Places, dtype: torch.dtype, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    rows = len(places.slots)
    q = torch.randn(rows, heads, dim, generator=rng).mul(2).to(dtype)
    new = tuple(torch.randn(rows, shared, dim, generator=rng).to(dtype) for _ in range(2))
    pages = tuple(torch.randn(PAGES, 16, shared, dim, generator=rng).to(dtype) for _ in range(2))
    return q, new, pages


SPANS = [(0, 1), (15, 1), (16, 1), (0, 40), (21, 37), (3, 3), (531, 1), (300, 0), (63, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "shared", "dim"), [(9, 3, 64), (4, 4, 16), (4, 1, 40), (2, 1, 7), (2, 2, 256)])
@pytest.mark.parametrize("window", [None, 5, 130])
def test_ops_paged_attention_equals_its_reference_on_every_path(dtype, heads, shared, dim, window):
    places = _places(SPANS, seed=dim)
    q, new, pages = _case(heads, shared, dim, places, dtype)
    held, scale = tuple(p.clone() for p in pages), 1.5 * dim**-0.5
    wanted = paged_attention_reference(q, new, held, places, scale, window)
    for name in library.paths():
        own = tuple(p.clone() for p in pages)
        with library.forced(name):
            found = paged_attention(q, new, own, places, scale, window)
        assert all(torch.equal(a, b) for a, b in zip(own, held, strict=True))
        close = {"atol": 6e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1e-2}
        torch.testing.assert_close(found, wanted, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_paged_attention_does_not_depend_on_threads_or_company(dtype):
    spans = [(1100, 1), (40, 30), (7, 1)]
    places = _places(spans, seed=1)
    q, new, pages = _case(6, 2, 32, places, dtype)
    whole = paged_attention(q, new, tuple(p.clone() for p in pages), places, 0.2)
    alone = Places(places.slots[:1], torch.tensor([0, 1]), places.contexts[:1], places.tables[:1])
    one = paged_attention(q[:1], (new[0][:1], new[1][:1]), tuple(p.clone() for p in pages), alone, 0.2)
    assert torch.equal(one, whole[:1])
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        assert torch.equal(paged_attention(q, new, tuple(p.clone() for p in pages), places, 0.2), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ops_paged_attention_does_not_read_what_no_token_holds(dtype):
    places = _places([(5, 1), (33, 2), (7, 21)], seed=2)
    q, new, pages = _case(4, 2, 24, places, dtype)
    held = torch.zeros(PAGES * 16, dtype=torch.bool)
    for s, n in enumerate((6, 35, 28)):
        for at in range(n):
            held[int(places.tables[s, at // 16]) * 16 + at % 16] = True
    pages = tuple(p.flatten(0, 1).masked_fill(~held[:, None, None], float("nan")).view_as(p) for p in pages)
    for name in library.paths():
        with library.forced(name):
            assert paged_attention(q, new, tuple(p.clone() for p in pages), places, 0.2).isfinite().all()


def test_ops_paged_attention_refuses_places_outside_of_the_pages():
    places = _places([(5, 1)], seed=3)
    q, new, pages = _case(4, 2, 24, places, torch.float32)
    wrong = [
        places._replace(slots=torch.tensor([PAGES * 16])),
        places._replace(contexts=torch.tensor([5000])),
        places._replace(tables=torch.full_like(places.tables, PAGES)),
        places._replace(bounds=torch.tensor([0, 2])),
        places._replace(tables=places.tables.long()),
    ]
    for one in wrong:
        with pytest.raises(ShapeError):
            paged_attention(q, new, pages, one, 0.2)
    with pytest.raises(ShapeError):
        paged_attention(q, (new[0][:, :1], new[1]), pages, places, 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
@pytest.mark.parametrize(("rows", "cols"), [(96, 64), (100, 72), (33, 50), (7, 576), (16, 15)])
def test_ops_paged_few_rows_equal_their_reference_on_every_path(dtype, n, rows, cols):
    rng = torch.Generator().manual_seed(rows)
    w, x = (torch.randn(size, cols, generator=rng).to(dtype) for size in (rows, n))
    wanted = few_rows_reference(x, w)
    for name in library.paths():
        with library.forced(name):
            torch.testing.assert_close(few_rows(x, w), wanted, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("n", [96, 107, 130])
@pytest.mark.parametrize(("rows", "cols"), [(96, 64), (70, 50), (7, 1600), (48, 801), (16, 15)])
def test_ops_paged_many_rows_of_bfloat16_equal_their_reference_on_every_path(n, rows, cols):
    rng = torch.Generator().manual_seed(rows)
    w, x = (torch.randn(size, cols, generator=rng).bfloat16() for size in (rows, n))
    wanted = few_rows_reference(x, w)
    for name in library.paths():
        with library.forced(name):
            torch.testing.assert_close(few_rows(x, w), wanted, atol=4e-4, rtol=1e-5)  # 1,600 terms of size 1
