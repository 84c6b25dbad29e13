"""Typed calls of elementwise.h. Everything that a kernel takes on trust is checked here: shapes, dtypes, memory, rows.

Rows come as [n, d], or [n, heads, d] with heads side by side: strides (any, d, 1). A slice of a wider buffer will do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.calls import DTYPES, checked
from deltaw.ops.native.library import running

ACTS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""Activations, as native.h numbers them."""

CHUNK = 64
"""Rows whose part of a gain's gradient is summed together: fixed, so that the sum does not depend on the threads."""

_pointer, _i64, _i32, _f32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float


class _Rows(ctypes.Structure):
    _fields_ = [("at", _pointer), ("stride", _i64)]


class _RmsNorm(ctypes.Structure):
    _fields_ = [
        ("x", _Rows), ("y", _Rows), ("gain", _pointer), ("rstd", _pointer), ("n", _i64), ("heads", _i64), ("d", _i64),
        ("eps", _f32), ("dtype", _i32),
    ]  # fmt: skip


class _RmsNormBackward(ctypes.Structure):
    _fields_ = [
        ("g", _Rows), ("x", _Rows), ("add", _Rows), ("dx", _Rows), ("gain", _pointer), ("rstd", _pointer),
        ("partial", _pointer), ("n", _i64), ("heads", _i64), ("d", _i64), ("chunk", _i64), ("dtype", _i32),
    ]  # fmt: skip


class _Rotate(ctypes.Structure):
    _fields_ = [
        ("x", _Rows), ("cos", _pointer), ("sin", _pointer), ("n", _i64), ("heads", _i64), ("d", _i64), ("r", _i64),
        ("dtype", _i32), ("back", _i32),
    ]  # fmt: skip


class _Gated(ctypes.Structure):
    _fields_ = [
        ("gate", _Rows), ("up", _Rows), ("h", _Rows), ("dh", _Rows), ("n", _i64), ("f", _i64), ("dtype", _i32),
        ("act", _i32),
    ]  # fmt: skip


class _CrossEntropy(ctypes.Structure):
    _fields_ = [
        ("logits", _Rows), ("out", _Rows), ("targets", _pointer), ("losses", _pointer), ("n", _i64), ("v", _i64),
        ("scale", _f32), ("dtype", _i32),
    ]  # fmt: skip


def suits(*tensors: Tensor | None) -> bool:
    """Whether the kernels run on these: all float32 or all bfloat16, and a library for the CPU.

    On the meta device too, where only memory is traced: callers allocate as for the kernels, and do not call them.
    """
    first = tensors[0]
    assert first is not None
    if first.dtype not in (torch.float32, torch.bfloat16) or first.device.type not in ("cpu", "meta"):
        return False
    same = all(t is None or (t.dtype == first.dtype and t.device == first.device) for t in tensors)
    return same and running() is not None


def rms_norm(x: Tensor, gain: Tensor | None, eps: float, y: Tensor, rstd: Tensor) -> None:
    """Fill `y` (rows like x's) and `rstd` float32, contiguous; `gain` float32 [d]. See `ops.rms.rms_norm`."""
    n, heads, d = _sizes("x", x)
    task = _RmsNorm(
        x=_rows("x", x, x), y=_rows("y", y, x, written=True),
        gain=_given("the weight", gain, d), rstd=checked("rstd", rstd, torch.float32, n * heads),
        n=n * heads, heads=heads, d=d, eps=eps, dtype=DTYPES[x.dtype],
    )  # fmt: skip
    _call("deltaw_rms_norm", task)


def rms_norm_backward(
    g: Tensor, x: Tensor, gain: Tensor | None, rstd: Tensor, add: Tensor | None, dx: Tensor, partial: Tensor | None
) -> None:
    """Fill `dx`, and `partial` float32 [ceil(rows / CHUNK), d]; dx may be g, x or add itself."""
    n, heads, d = _sizes("x", x)
    chunks = -(-n * heads // CHUNK)
    task = _RmsNormBackward(
        g=_rows("g", g, x), x=_rows("x", x, x), dx=_rows("dx", dx, x, written=True),
        add=_Rows() if add is None else _rows("add", add, x),
        gain=_given("the weight", gain, d), rstd=checked("rstd", rstd, torch.float32, n * heads),
        partial=_given("partial", partial, chunks * d),
        n=n * heads, heads=heads, d=d, chunk=CHUNK, dtype=DTYPES[x.dtype],
    )  # fmt: skip
    _call("deltaw_rms_norm_backward", task)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> None:
    """Rotate the first r features of x [n, heads, d] in place; cos, sin float32 [n, r], contiguous, r even."""
    n, heads, d = _sizes("x", x)
    r = cos.shape[-1]
    if x.ndim != 3 or r > d or r % 2 or cos.shape != (n, r) or sin.shape != (n, r):
        raise ShapeError(f"{list(x.shape)} is not rotated by cos {list(cos.shape)} and sin {list(sin.shape)}.")
    task = _Rotate(
        x=_rows("x", x, x, written=True), cos=checked("cos", cos, torch.float32, n * r),
        sin=checked("sin", sin, torch.float32, n * r), n=n, heads=heads, d=d, r=r, dtype=DTYPES[x.dtype], back=back,
    )  # fmt: skip
    _call("deltaw_rotate", task)


def gated(gate: Tensor, up: Tensor, act: str, h: Tensor) -> None:
    """Fill `h` [n, f] with act(gate) up."""
    task = _Gated(gate=_rows("gate", gate, gate), up=_rows("up", up, gate), h=_rows("h", h, gate, written=True))
    _call_gated("deltaw_gated", task, gate, act)


def gated_backward(dh: Tensor, gate: Tensor, up: Tensor, act: str, h: Tensor) -> None:
    """Fill `h` with act(gate) up, then `gate` and `up` with their gradients; h may be dh's own memory."""
    task = _Gated(
        gate=_rows("gate", gate, gate, written=True), up=_rows("up", up, gate, written=True),
        h=_rows("h", h, gate, written=True), dh=_rows("dh", dh, gate),
    )  # fmt: skip
    _call_gated("deltaw_gated_backward", task, gate, act)


def cross_entropy(logits: Tensor, targets: Tensor, scale: float, out: Tensor | None, losses: Tensor) -> None:
    """Fill `losses` float32 [n], and `out` [n, v] with scale (softmax - onehot): logits' own memory, or None.

    Raises ShapeError too for a target outside of the vocabulary.
    """
    if logits.ndim != 2:
        raise ShapeError(f"logits are {list(logits.shape)}; the kernel needs [n, v].")
    n, v = logits.shape
    task = _CrossEntropy(
        logits=_rows("logits", logits, logits),
        out=_Rows() if out is None else _rows("out", out, logits, written=True),
        targets=_targets(targets, n, v), losses=checked("losses", losses, torch.float32, n),
        n=n, v=v, scale=scale, dtype=DTYPES[logits.dtype],
    )  # fmt: skip
    _call("deltaw_cross_entropy", task)


def _targets(targets: Tensor, n: int, v: int) -> int:
    fits = targets.dtype == torch.int64 and targets.shape == (n,) and targets.is_contiguous() and targets.is_cpu
    if not fits:
        raise ShapeError(f"targets are {list(targets.shape)} {targets.dtype}; the kernel needs {n} contiguous int64.")
    if n:
        low, high = (int(t) for t in torch.aminmax(targets))
        if low < 0 or high >= v:
            raise ShapeError(f"targets from {low} to {high} do not lie in a vocabulary of {v}.")
    return targets.data_ptr()


def _sizes(name: str, x: Tensor) -> tuple[int, int, int]:
    if x.ndim not in (2, 3):
        raise ShapeError(f"{name} is {list(x.shape)}; the kernel needs [n, d] or [n, heads, d].")
    return x.shape[0], 1 if x.ndim == 2 else x.shape[1], x.shape[-1]


def _rows(name: str, tensor: Tensor, like: Tensor, written: bool = False) -> _Rows:
    """The rows of `tensor`, which has the shape and dtype of `like`; rows that are written do not overlap."""
    n, heads, d = _sizes(name, tensor)
    stride = tensor.stride()
    fits = tensor.shape == like.shape and tensor.dtype == like.dtype and tensor.dtype in DTYPES and tensor.is_cpu
    fits = fits and (d < 2 or stride[-1] == 1) and (heads < 2 or stride[1] == d)
    if not fits or (written and n > 1 and stride[0] < heads * d):
        raise ShapeError(
            f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, strides {list(stride)}.\n"
            f"  The kernel needs {list(like.shape)} {like.dtype} on the CPU, each row contiguous, heads side by side."
        )
    return _Rows(tensor.data_ptr(), stride[0])


def _given(name: str, tensor: Tensor | None, n: int) -> int | None:
    return None if tensor is None else checked(name, tensor, torch.float32, n)


def _call_gated(name: str, task: _Gated, gate: Tensor, act: str) -> None:
    if gate.ndim != 2:
        raise ShapeError(f"gate is {list(gate.shape)}; the kernel needs [n, f].")
    task.n, task.f, task.dtype, task.act = *gate.shape, DTYPES[gate.dtype], ACTS[act]
    _call(name, task)


def _call(name: str, task: Any) -> None:
    found = running()
    assert found is not None, "callers ask suits() first"
    if task.n:
        library, at = found
        done = getattr(library, name)(at, torch.get_num_threads(), ctypes.byref(task))
        assert done == 0
