"""Typed calls of the compiled attention (attention.h). Shapes, dtypes, strides and bounds are checked here."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.calls import DTYPES
from deltaw.ops.native.library import running

WIDEST = 256
"""Features that a head can have."""

_pointer, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
_ROWS = ("q", "k", "v", "o", "g", "dq", "dk", "dv")


class _Rows(ctypes.Structure):
    _fields_ = [("at", _pointer), ("token", _i64), ("head", _i64)]


class _Attention(ctypes.Structure):
    _fields_ = [
        ("q", _Rows), ("k", _Rows), ("v", _Rows), ("o", _Rows), ("g", _Rows),
        ("dq", _Rows), ("dk", _Rows), ("dv", _Rows), ("lse", _pointer), ("bounds", _pointer), ("fronts", _pointer),
        ("tokens", _i64), ("heads", _i64), ("shared", _i64), ("dim", _i64), ("docs", _i64), ("window", _i64),
        ("scale", ctypes.c_float), ("dtype", _i32),
    ]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What forward and backward share: document bounds int64 [n + 1], the scale, the window (None: no limit), and the
    document that each goes on from, int64 [n], -1 for none (None: none at all)."""

    bounds: Tensor
    scale: float
    window: int | None = None
    fronts: Tensor | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, setting: Setting, o: Tensor, lse: Tensor) -> None:
    """Fill `o` [T, H, D] and `lse` float32 [H, T]; q [T, H, D], k and v [T, G, D], any strides but the last."""
    _call("deltaw_attend", _task(setting, lse, q=q, k=k, v=v, o=o))


def attend_backward(
    rows: tuple[Tensor, ...], lse: Tensor, setting: Setting, out: tuple[Tensor, Tensor, Tensor]
) -> None:
    """Fill `out`, (dq, dk, dv), from `rows`, (q, k, v, o, g).

    dq may be q or g, dk k and dv v, in the same places: a document's heads are read before their gradients are written.
    """
    _call("deltaw_attend_backward", _task(setting, lse, **dict(zip(_ROWS, (*rows, *out), strict=True))))


def checked_bounds(bounds: Tensor, tokens: int) -> list[int]:
    """The values of `bounds`. Raises ShapeError unless they are int64 [n + 1] in CPU memory, from 0 up to `tokens`."""
    if bounds.dtype != torch.int64 or bounds.ndim != 1 or not bounds.is_cpu or not bounds.is_contiguous():
        raise ShapeError(f"bounds are {list(bounds.shape)} {bounds.dtype}, needed: int64 [n + 1] on the CPU.")
    found: list[int] = bounds.tolist()
    if not found or found[0] != 0 or found[-1] != tokens or found != sorted(found):
        raise ShapeError(f"bounds that begin {found[:4]} and end {found[-1:]} do not ascend from 0 to {tokens}.")
    return found


def checked_fronts(fronts: Tensor | None, bounds: list[int]) -> list[int]:
    """The document that each goes on from, -1 for none. Raises ShapeError unless it has tokens and no front itself."""
    n = len(bounds) - 1
    if fronts is None:
        return [-1] * n
    if fronts.dtype != torch.int64 or fronts.shape != (n,) or not fronts.is_cpu or not fronts.is_contiguous():
        raise ShapeError(f"fronts are {list(fronts.shape)} {fronts.dtype}, needed: int64 {[n]} on the CPU.")
    found: list[int] = fronts.tolist()
    for doc, front in enumerate(found):
        if front != -1 and not (0 <= front < n and found[front] == -1 and bounds[front] < bounds[front + 1]):
            raise ShapeError(f"document {doc} goes on from {front}: that is none with tokens that begins by itself.")
    return found


def _task(setting: Setting, lse: Tensor, **rows: Tensor) -> _Attention:
    q, k = rows["q"], rows["k"]
    tokens, heads, dim = q.shape
    shared = k.shape[1]
    if shared < 1 or heads % shared or not 1 <= dim <= WIDEST or q.dtype not in (torch.float32, torch.bfloat16):
        raise ShapeError(f"attention of {heads} heads of {dim} {q.dtype} on {shared} key-value heads is not possible.")
    out = _Attention(tokens=tokens, heads=heads, shared=shared, dim=dim, scale=setting.scale, dtype=DTYPES[q.dtype])
    for name, t in rows.items():
        setattr(out, name, _rows(name, t, (tokens, shared if name in ("k", "v", "dk", "dv") else heads, dim), q.dtype))
    if lse.shape != (heads, tokens) or lse.dtype != torch.float32 or not lse.is_contiguous() or not lse.is_cpu:
        raise ShapeError(f"lse is {list(lse.shape)} {lse.dtype}, needed: {[heads, tokens]} float32, contiguous.")
    window = tokens if setting.window is None else min(setting.window, tokens)
    out.window, out.lse, out.docs = max(1, window), lse.data_ptr(), len(setting.bounds) - 1
    checked_fronts(setting.fronts, checked_bounds(setting.bounds, tokens))
    out.bounds = setting.bounds.data_ptr()
    out.fronts = None if setting.fronts is None else setting.fronts.data_ptr()
    return out


def _rows(name: str, t: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> _Rows:
    if t.shape != shape or t.dtype != dtype or not t.is_cpu or (t.stride(2) != 1 and shape[2] > 1):
        raise ShapeError(
            f"{name} is {list(t.shape)} {t.dtype} on {t.device}, strides {t.stride()}.\n"
            f"  The kernel needs {list(shape)} {dtype} on the CPU, features side by side."
        )
    return _Rows(at=t.data_ptr(), token=t.stride(0), head=t.stride(1))


def _call(name: str, task: _Attention) -> None:
    found = running()
    assert found is not None, "callers ask running() first"
    library, at = found
    done = getattr(library, name)(at, torch.get_num_threads(), ctypes.byref(task))
    if done == 2:
        raise MemoryError(f"{name} found no memory")
    assert done == 0
