"""Typed calls of thin.h. Shapes, dtypes, strides and memory are checked here."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.library import running

CHUNK = 256
"""Rows whose sums are taken together: fixed, so that they do not depend on the threads."""

_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64
_MATRICES = ("g", "u", "h")


_SIZES = ("g_stride", "u_stride", "h_stride", "factor_row", "factor_col", "n", "cols", "rank", "chunk")
_OF_THIN: list[tuple[str, Any]] = [(name, _pointer) for name in (*_MATRICES, "factor", "sums")]


class _Thin(ctypes.Structure):
    _fields_ = [*_OF_THIN, *((name, _i64) for name in _SIZES), ("scale", ctypes.c_float)]


def available() -> bool:
    """Whether the path that runs has these kernels: the one with products of bf16 pairs."""
    found = running()
    return found is not None and bool(found[0].deltaw_has_thin(found[1]))


def back(g: Tensor, factor: Tensor | None, u: Tensor | None, scale: float, h: Tensor | None) -> Tensor | None:
    """Fill `h` [n, rank] with scale g factor; the sums [chunks, rank, cols] float32 of u^T g where u is given.

    g [n, cols], factor [cols, rank] in any strides, u [n, rank]: bfloat16; cols even where h is wanted.
    """
    n, cols = g.shape
    side = u if h is None else h
    if side is None or (h is not None and (factor is None or cols % 2)):
        raise ShapeError(f"thin_back of g {list(g.shape)} has nothing to fill, or an odd width.")
    task = _task(side.shape[1], cols, n, scale, g=g, u=u, h=h)
    if factor is not None:
        _factor(task, factor)
    sums = None if u is None else torch.empty(-(-n // CHUNK), side.shape[1], cols, dtype=torch.float32)
    if sums is not None:
        task.sums = sums.data_ptr()
    _call(task)
    return sums


def _task(rank: int, cols: int, n: int, scale: float, **matrices: Tensor | None) -> _Thin:
    task = _Thin(n=n, cols=cols, rank=rank, chunk=CHUNK, scale=scale)
    for name, t in matrices.items():
        if t is None:
            continue
        width = cols if name == "g" else rank
        if t.shape != (n, width) or t.dtype != torch.bfloat16 or not t.is_cpu or (width > 1 and t.stride(1) != 1):
            raise ShapeError(
                f"{name} is {list(t.shape)} {t.dtype} on {t.device}, strides {t.stride()}.\n"
                f"  The kernel needs {[n, width]} torch.bfloat16 on the CPU, columns side by side."
            )
        setattr(task, name, t.data_ptr())
        setattr(task, f"{name}_stride", t.stride(0))
    return task


def _factor(task: _Thin, factor: Tensor) -> None:
    if factor.shape != (task.cols, task.rank) or factor.dtype != torch.bfloat16 or not factor.is_cpu:
        raise ShapeError(
            f"the factor is {list(factor.shape)} {factor.dtype}, needed: {[task.cols, task.rank]} bfloat16."
        )
    task.factor = factor.data_ptr()
    task.factor_row, task.factor_col = factor.stride()


def _call(task: _Thin) -> None:
    if not task.n or not task.cols or not task.rank:
        return
    found = running()
    assert found is not None, "callers ask available() first"
    library, at = found
    done = library.deltaw_thin(at, torch.get_num_threads(), ctypes.byref(task))
    if done == 2:
        raise MemoryError("deltaw_thin found no memory")
    assert done == 0
