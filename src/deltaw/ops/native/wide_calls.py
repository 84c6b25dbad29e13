"""Typed calls of wide.h. Shapes, dtypes, strides and memory are checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.calls import Packed, checked
from deltaw.ops.native.library import running

SPAN = 32
"""Columns of a panel, as wide.h has them: what the room for a product depends on."""

LEAD = 256
"""Terms to a sum that may go before the others, with a scale."""

_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64


class _Term(ctypes.Structure):
    _fields_ = [
        ("x", _pointer), ("w", _pointer), ("packed", _pointer), ("x_stride", _i64), ("w_stride", _i64), ("depth", _i64),
        ("scale", ctypes.c_float), ("turned", ctypes.c_int32),
    ]  # fmt: skip


class _Band(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("terms", "bias", "onto", "y")] + [
        (name, _i64) for name in ("n_terms", "cols", "onto_stride", "y_stride")
    ]


class _Wide(ctypes.Structure):
    _fields_ = [("bands", _pointer), ("n_bands", _i64), ("n", _i64)]


class Term(NamedTuple):
    """x M. x [n, depth], M [depth, cols] bfloat16, each with its rows or its columns side by side (x: its columns).

    m       M, or (pointers, back): a matrix W in few bits, of which M is W^T, or W where it goes back
    scale   of a first term of at most LEAD to a sum, where others follow
    """

    x: Tensor
    m: Tensor | tuple[Packed, bool]
    scale: float = 1.0


class Band(NamedTuple):
    """y [n, cols] = onto + bias + the terms' sum; bias [cols] float32, onto [n, cols] bfloat16, which may be y."""

    y: Tensor
    terms: Sequence[Term]
    bias: Tensor | None = None
    onto: Tensor | None = None


def available() -> bool:
    """Whether the path that runs has these kernels: those of bf16 pairs and of tiles do."""
    found = running()
    return found is not None and bool(found[0].deltaw_reads_pairs(found[1]))


def room(n: int, columns: Sequence[int]) -> int:
    """Bytes that a product of n rows needs, whose bands have so many columns."""
    library, at = _library()
    panels = sum(-(-c // SPAN) for c in columns)
    return int(library.deltaw_wide_room(at, torch.get_num_threads(), _i64(n), _i64(panels)))


def products(bands: Sequence[Band], scratch: Tensor) -> None:
    """Fill each band's y. All x have the same number of rows; scratch: uint8 of `room` bytes or more."""
    n = bands[0].y.shape[0]
    if n == 0:
        return
    made, kept = (_Band * len(bands))(), []
    for out, band in zip(made, bands, strict=True):
        terms = (_Term * len(band.terms))()
        cols = band.y.shape[1]
        for into, term in zip(terms, band.terms, strict=True):
            _fill(into, term, n, cols, leads=len(terms) > 1 and term is band.terms[0])
        kept.append(terms)
        out.terms, out.n_terms, out.cols = ctypes.addressof(terms), len(terms), cols
        out.y, out.y_stride = _rows("y", band.y, n, cols), band.y.stride(0)
        if band.bias is not None:
            out.bias = checked("bias", band.bias, torch.float32, cols)
        if band.onto is not None:
            out.onto, out.onto_stride = _rows("onto", band.onto, n, cols), band.onto.stride(0)
    if scratch.numel() < room(n, [b.y.shape[1] for b in bands]):
        raise ShapeError(f"{scratch.numel()} bytes are too few for a product of {n} rows.")
    library, at = _library()
    task = _Wide(ctypes.addressof(made), len(bands), n)
    data = _pointer(checked("scratch", scratch, torch.uint8, scratch.numel()))
    done = library.deltaw_wide(at, torch.get_num_threads(), ctypes.byref(task), data)
    if done == 2:
        raise MemoryError("deltaw_wide found no memory")
    assert done == 0


def _fill(into: _Term, term: Term, n: int, cols: int, leads: bool) -> None:
    x, m = term.x, term.m
    depth = x.shape[1]
    if depth % 2 or not depth or (term.scale != 1 and not (leads and depth <= LEAD)):
        raise ShapeError(f"{depth} terms to a sum, scaled by {term.scale}: the kernel takes an even number, unscaled.")
    into.x, into.x_stride = _rows("x", x, n, depth), x.stride(0)
    into.depth, into.scale = depth, term.scale
    if isinstance(m, tuple):
        packed, back = m
        shape = (packed.rows, packed.cols) if back else (packed.cols, packed.rows)
        into.packed, into.turned = ctypes.addressof(packed), not back
    else:
        shape = (m.shape[0], m.shape[1])
        into.turned = m.stride(0) == 1 and m.stride(1) != 1
        into.w, into.w_stride = m.data_ptr(), m.stride(1 if into.turned else 0)
        if m.dtype != torch.bfloat16 or not m.is_cpu or (not into.turned and cols > 1 and m.stride(1) != 1):
            raise ShapeError(f"a factor is {m.dtype} on {m.device}, strides {m.stride()}: the kernel takes bfloat16.")
    if shape != (depth, cols):
        raise ShapeError(f"a factor is {list(shape)}, needed: {[depth, cols]}.")


def _rows(name: str, t: Tensor, n: int, width: int) -> int:
    fits = t.shape == (n, width) and t.dtype == torch.bfloat16 and t.is_cpu and (width < 2 or t.stride(1) == 1)
    if not fits:
        raise ShapeError(
            f"{name} is {list(t.shape)} {t.dtype} on {t.device}, strides {t.stride()}.\n"
            f"  The kernel needs {[n, width]} torch.bfloat16 on the CPU, columns side by side."
        )
    return t.data_ptr()


def _library() -> tuple[Any, int]:
    found = running()
    assert found is not None, "callers ask available() first"
    return found
