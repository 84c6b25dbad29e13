"""The arena never hands out memory that somebody holds."""

from __future__ import annotations

import pytest
import torch

from deltaw.ops import arena as module
from deltaw.ops.arena import Arena

LIKE = torch.empty(0)


def test_ops_arena_gives_the_same_memory_again_after_a_lease() -> None:
    arena = Arena()
    lease = arena.lease()
    first = arena.keep(3, 5, like=LIKE)
    second = arena.keep(7, like=LIKE, dtype=torch.bfloat16)
    lease.close()
    assert first.shape == (3, 5)
    assert first.is_contiguous()
    assert second.dtype == torch.bfloat16
    first.fill_(1)
    second.fill_(2)
    assert bool((first == 1).all())
    assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
    lease.end()
    lease.end()
    assert arena.kept == 0
    assert arena.keep(1, like=LIKE).data_ptr() == first.data_ptr()
    assert arena.peak == 128


def test_ops_arena_rows_of_a_multiple_of_2_kb_lie_apart_where_it_is_asked() -> None:
    arena = Arena()
    for shape in ((5, 1024), (5, 16, 64), (1, 1024), (0, 1024)):
        lease = arena.lease()
        made = arena.keep(*shape, like=LIKE, dtype=torch.bfloat16, apart=True)
        behind = arena.keep(8, like=LIKE)
        lease.close()
        assert made.shape == shape
        assert made.stride(0) == 1056
        assert made.flatten(1).stride(1) == 1
        made.fill_(3)
        behind.fill_(4)
        assert bool((made == 3).all())
        size = arena.kept
        lease.end()
        counted = Arena()
        told = counted.keep(*shape, like=LIKE.to("meta"), dtype=torch.bfloat16, apart=True)
        assert told.stride() == made.stride()
        assert counted.kept == size - 64
        assert counted.kept == told.untyped_storage().nbytes()
    assert arena.keep(5, 1024, like=LIKE, dtype=torch.bfloat16).is_contiguous()
    assert arena.keep(5, 1000, like=LIKE, dtype=torch.bfloat16, apart=True).is_contiguous()


def test_ops_arena_leases_that_end_out_of_order_leave_a_hole_and_no_overlap() -> None:
    arena = Arena()
    held = []
    for value in range(3):
        lease = arena.lease()
        held.append((lease, arena.keep(16, like=LIKE).fill_(value)))
        lease.close()
    held[1][0].end()
    assert arena.kept == 3 * 64
    late = arena.lease()
    arena.keep(16, like=LIKE).fill_(9)
    late.close()
    assert bool((held[0][1] == 0).all())
    assert bool((held[2][1] == 2).all())
    late.end()
    held[2][0].end()
    assert arena.kept == 2 * 64  # the hole: nobody's, until the first ends too
    del held[0]
    del lease
    held.clear()
    assert arena.kept == 0


def test_ops_arena_scratch_is_apart_from_what_is_kept() -> None:
    arena = Arena()
    with arena.scratch():
        a = arena.borrow(16, like=LIKE).fill_(1)
        kept = arena.keep(16, like=LIKE).fill_(2)
        with arena.scratch():
            b = arena.borrow(16, like=LIKE).fill_(3)
        assert arena.borrow(16, like=LIKE).data_ptr() == b.data_ptr()
        assert bool((a == 1).all())
    assert bool((kept == 2).all())
    assert arena.borrow(16, like=LIKE).data_ptr() == a.data_ptr()


def test_ops_arena_without_a_region_allocates_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "physical_bytes", lambda: 0)
    arena = Arena()
    a, b = arena.keep(4, like=LIKE), arena.keep(4, like=LIKE)
    assert a.data_ptr() != b.data_ptr()
    assert arena.kept == 0
    assert arena.keep(2, like=torch.empty(0, device="meta")).is_meta
