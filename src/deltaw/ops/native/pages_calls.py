"""Typed calls of attention over pages and of products of few rows (pages.h, rows.h). Everything is checked here."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.calls import DTYPES, reads_pairs
from deltaw.ops.native.library import running

PAGE = 16
"""Tokens of a page."""

WIDEST = 256
"""Features that a head can have."""

PADDING = 32
"""Rows that a product reads have zeros up to a multiple of this."""

_pointer, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


def fields(**kinds: str) -> list[tuple[str, Any]]:
    """Fields of a structure, in order: pointers, sizes (int64), floats (float32) and ints (int32)."""
    types = {"pointers": _pointer, "sizes": _i64, "floats": ctypes.c_float, "ints": _i32}
    return [(name, types[kind]) for kind, names in kinds.items() for name in names.split()]


class _Dense(ctypes.Structure):
    _fields_ = fields(pointers="w x y added", sizes="rows cols n x_stride y_stride n_added", ints="dtype type")


class _Paged(ctypes.Structure):
    _fields_ = fields(
        pointers="q o keys values bounds contexts tables",
        sizes="sequences width heads shared dim window o_stride q_stride",
        floats="scale",
        ints="dtype type out_type",
    )


def dense(x: Tensor, w: Tensor, y: Tensor) -> None:
    """Fill y [n, rows] float32 with x [n, cols] W^T; w [rows, cols] contiguous, float32 or bfloat16.

    x is copied into the form that the kernel reads: w's dtype where `reads_pairs`, else float32.
    """
    n, cols = x.shape
    kinds = (torch.float32, torch.bfloat16)
    if w.dtype not in kinds or w.ndim != 2 or w.shape[1] != cols or not (w.is_contiguous() and w.is_cpu and x.is_cpu):
        raise ShapeError(f"rows of {cols} and a matrix of {list(w.shape)} {w.dtype} have no such product.")
    if y.shape != (n, w.shape[0]) or y.dtype != torch.float32 or not y.is_contiguous() or not y.is_cpu:
        raise ShapeError(f"y is {list(y.shape)} {y.dtype}, needed: {[n, w.shape[0]]} float32, contiguous.")
    rows = rows_for_products(x, w.dtype)
    task = _Dense(
        w=w.data_ptr(), x=rows.data_ptr(), y=y.data_ptr(), rows=w.shape[0], cols=cols, n=n, x_stride=rows.shape[1],
        y_stride=w.shape[0], dtype=DTYPES[w.dtype], type=DTYPES[rows.dtype],
    )  # fmt: skip
    library, at = _library()
    if n:
        assert library.deltaw_dense(at, torch.get_num_threads(), ctypes.byref(task)) == 0


def rows_for_products(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [n, cols] with zeros up to a multiple of PADDING, and a few rows more, as products by `dtype` read it."""
    n, cols = x.shape
    of = torch.bfloat16 if dtype == torch.bfloat16 and reads_pairs() else torch.float32
    rows = torch.zeros(n + 4, -(-cols // PADDING) * PADDING, dtype=of)
    rows[:n, :cols] = x
    return rows


def paged(
    q: Tensor,
    new: tuple[Tensor, Tensor],
    pages: tuple[Tensor, Tensor],
    places: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    window: int | None,
    o: Tensor,
) -> None:
    """Put the new keys and values into their slots, then fill `o` [T, H, D]; see `ops.paged.paged_attention`.

    new     k and v [T, G, D];  pages: keys and values [P, 16, G, D];  places: slots, bounds, contexts, tables
    """
    keys, values = pages
    slots, bounds, contexts, tables = places
    rows, heads, dim = q.shape
    shared = keys.shape[2]
    _check(q, new, pages, o)
    _check_places(places, rows, keys.shape[0])
    task = _Paged(
        q=q.data_ptr(), o=o.data_ptr(), keys=keys.data_ptr(), values=values.data_ptr(), bounds=bounds.data_ptr(),
        contexts=contexts.data_ptr(), tables=tables.data_ptr(), sequences=len(contexts), width=tables.shape[1],
        heads=heads, shared=shared, dim=dim, window=2**62 if window is None else window, o_stride=heads * dim,
        q_stride=heads * dim, scale=scale, dtype=DTYPES[q.dtype], type=DTYPES[q.dtype], out_type=DTYPES[q.dtype],
    )  # fmt: skip
    library, at = _library()
    k, v = (_pointer(t.data_ptr()) for t in new)
    if rows:
        done = library.deltaw_paged(at, torch.get_num_threads(), ctypes.byref(task), k, v, _pointer(slots.data_ptr()))
        if done == 2:
            raise MemoryError("deltaw_paged found no memory")
        assert done == 0


def _check(q: Tensor, new: tuple[Tensor, Tensor], pages: tuple[Tensor, Tensor], o: Tensor) -> None:
    rows, heads, dim = q.shape
    n_pages, shared = pages[0].shape[0], pages[0].shape[2]
    if q.dtype not in (torch.float32, torch.bfloat16) or not 1 <= dim <= WIDEST or not shared or heads % shared:
        raise ShapeError(f"attention of {heads} heads of {dim} {q.dtype} on {shared} key-value heads is not possible.")
    wanted: list[tuple[Tensor, tuple[int, ...]]] = [(q, (rows, heads, dim)), (o, (rows, heads, dim))]
    wanted += [(t, (rows, shared, dim)) for t in new] + [(t, (n_pages, PAGE, shared, dim)) for t in pages]
    for t, shape in wanted:
        if t.shape != shape or t.dtype != q.dtype or not t.is_contiguous() or not t.is_cpu:
            raise ShapeError(f"found {list(t.shape)} {t.dtype}, the kernel needs {list(shape)} {q.dtype}, contiguous.")


def _check_places(places: tuple[Tensor, Tensor, Tensor, Tensor], rows: int, n_pages: int) -> None:
    """Raise ShapeError unless every row has its slot and every context its pages."""
    slots, bounds, contexts, tables = places
    kinds = [t.dtype for t in places] == [torch.int64, torch.int64, torch.int64, torch.int32]
    if not kinds or tables.ndim != 2 or not all(t.is_contiguous() and t.is_cpu for t in places):
        raise ShapeError("slots, bounds and contexts are int64, tables int32 [S, P], contiguous, on the CPU.")
    if len(slots) != rows or len(bounds) != len(contexts) + 1 or len(tables) != len(contexts):
        raise ShapeError(f"{len(slots)} slots, {len(bounds)} bounds, {len(contexts)} contexts for {rows} rows.")
    check_places(slots, bounds, contexts, tables, n_pages)


def check_places(slots: Tensor, bounds: Tensor, contexts: Tensor, tables: Tensor, n_pages: int) -> None:
    """Raise ShapeError unless every row has its slot and every sequence's tokens lie in pages."""
    n = len(slots)
    ends = bounds.tolist()
    if not ends or ends[0] != 0 or ends[-1] != n or ends != sorted(ends):
        raise ShapeError(f"bounds {ends[:4]} ... {ends[-1:]} do not ascend from 0 to {n}.")
    if n and not 0 <= int(slots.min()) <= int(slots.max()) < n_pages * PAGE:
        raise ShapeError(f"slots do not lie in {n_pages} pages.")
    if not n:
        return
    used = (contexts + bounds.diff() + PAGE - 1) // PAGE
    held = tables[torch.arange(tables.shape[1]) < used[:, None]]
    fits = int(contexts.min()) >= 0 and int(used.max()) <= tables.shape[1]
    if not fits or (len(held) and not 0 <= int(held.min()) <= int(held.max()) < n_pages):
        raise ShapeError(f"tokens of a sequence do not lie in its {tables.shape[1]} of {n_pages} pages.")


def _library() -> tuple[ctypes.CDLL, int]:
    found = running()
    assert found is not None, "callers ask running() first"
    return found
