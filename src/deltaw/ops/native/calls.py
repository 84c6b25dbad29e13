"""Typed calls of the compiled kernels. Everything that a kernel takes on trust is checked here: shapes, dtypes, memory.

A matrix comes as the fields of `ops.blockwise.Blocks`; `Packed` holds the pointers that the kernels read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops.native.library import running

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Dtypes that the kernels read and write, as native.h numbers them."""

LONGEST_BLOCK = 4096
NESTED_BLOCK = 256

_pointer, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Packed(ctypes.Structure):
    """`Matrix` of native.h."""

    _fields_ = [
        ("codes", _pointer),
        ("table", _pointer),
        ("absmax", _pointer),
        ("absmax_codes", _pointer),
        ("nested", _pointer),
        ("nested_table", _pointer),
        ("offset", _pointer),
        ("rows", _i64),
        ("cols", _i64),
        ("bits", _i32),
        ("block_log2", _i32),
    ]


class _Quantise(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("values", "bounds", "order", "codes", "absmax")] + [
        ("n", _i64), ("dtype", _i32), ("bits", _i32), ("block_log2", _i32),
    ]  # fmt: skip


class _Dynamic(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("values", "codes", "absmax", "cells", "table")] + [
        ("n", _i64), ("block", _i64),
    ]  # fmt: skip


class _Dequantise(ctypes.Structure):
    _fields_ = [
        ("m", Packed), ("out", _pointer), ("row0", _i64), ("row1", _i64), ("col0", _i64), ("col1", _i64),
        ("stride", _i64), ("dtype", _i32),
    ]  # fmt: skip


class _Product(ctypes.Structure):
    _fields_ = [
        ("m", Packed),
        ("x", _pointer),
        ("bias", _pointer),
        ("y", _pointer),
        ("n", _i64),
        ("x_stride", _i64),
        ("y_stride", _i64),
        ("dtype", _i32),
        ("out_dtype", _i32),
    ]


def pack(
    codes: Tensor, table: Tensor, bits: int, block: int, shape: tuple[int, int], scales: Sequence[Tensor]
) -> Packed:
    """The pointers of a matrix; valid while the tensors are.

    scales   (absmax,) float32, or (codes of absmax uint8, nested absmax, table [256], offset) for double quantisation

    Raises ShapeError for anything that the kernels could not read safely.
    """
    rows, cols = shape
    n = rows * cols
    check_block(block)
    if bits not in (4, 8) or rows < 1 or cols < 1 or len(scales) not in (1, 4):
        raise ShapeError(f"a matrix of {list(shape)} in {bits} bits with {len(scales)} constants is not possible.")
    n_blocks = -(-n // block)
    out = Packed(rows=rows, cols=cols, bits=bits, block_log2=block.bit_length() - 1)
    out.codes = checked("codes", codes, torch.uint8, -(-n * bits // 8))
    out.table = checked("table", table, torch.float32, 1 << bits)
    if len(scales) == 1:
        out.absmax = checked("absmax", scales[0], torch.float32, n_blocks)
        return out
    out.absmax_codes = checked("absmax", scales[0], torch.uint8, n_blocks)
    out.nested = checked("nested", scales[1], torch.float32, -(-n_blocks // NESTED_BLOCK))
    out.nested_table = checked("the table of absmax", scales[2], torch.float32, 256)
    out.offset = checked("offset", scales[3], torch.float32, 1)
    return out


def quantise(values: Tensor, bounds: Tensor, order: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes (packed for 4 bits) and absmax of the contiguous `values`; see `ops.blockwise.quantise`.

    bounds   [2**bits - 1] float32, ascending midpoints; order [2**bits] uint8, the code of each rank
    """
    check_block(block)
    n = values.numel()
    codes = torch.empty(-(-n * bits // 8), dtype=torch.uint8)
    absmax = torch.empty(-(-n // block), dtype=torch.float32)
    task = _Quantise(
        values=checked("values", values, values.dtype, n),
        bounds=checked("bounds", bounds, torch.float32, (1 << bits) - 1),
        order=checked("order", order, torch.uint8, 1 << bits),
        codes=codes.data_ptr(), absmax=absmax.data_ptr(), n=n, dtype=DTYPES[values.dtype], bits=bits,
        block_log2=block.bit_length() - 1,
    )  # fmt: skip
    _call("deltaw_quantise", task)
    return codes, absmax


def quantise_dynamic(values: Tensor, cells: Tensor, block: int, codes: Tensor, absmax: Tensor) -> None:
    """Fill `codes` uint8 [n] and `absmax` float32 [ceil(n / block)] from `values` float32 [n].

    cells   uint8 [65536], the code of each cell over [-1, 1]
    """
    _call("deltaw_quantise_dynamic", _dynamic(values, codes, absmax, block, cells=cells))


def dequantise_dynamic(codes: Tensor, absmax: Tensor, table: Tensor, block: int, values: Tensor) -> None:
    """Fill `values` float32 [n] with table[codes] * absmax of each block."""
    _call("deltaw_dequantise_dynamic", _dynamic(values, codes, absmax, block, table=table))


def dequantise(m: Packed, out: Tensor, rows: tuple[int, int], cols: tuple[int, int]) -> None:
    """Fill `out` [r1 - r0, c1 - c0], contiguous, with that rectangle of the matrix."""
    (r0, r1), (c0, c1) = rows, cols
    if not (0 <= r0 <= r1 <= m.rows and 0 <= c0 <= c1 <= m.cols):
        raise ShapeError(f"rows {rows}, columns {cols} do not lie in a matrix of {m.rows} x {m.cols}.")
    at = checked("out", out, out.dtype, (r1 - r0) * (c1 - c0))
    if out.numel():
        task = _Dequantise(m=m, out=at, row0=r0, row1=r1, col0=c0, col1=c1, stride=c1 - c0, dtype=DTYPES[out.dtype])
        _call("deltaw_dequantise", task)


def product(x: Tensor, m: Packed, bias: Tensor | None, y: Tensor) -> None:
    """Fill `y` [..., rows] with x [..., cols] W^T + bias: for few rows of x, read again for every row of W."""
    n = y.numel() // m.rows
    at = checked("x", x, x.dtype, n * m.cols)
    of_bias = None if bias is None else checked("bias", bias, x.dtype, m.rows)
    to = checked("y", y, x.dtype, n * m.rows)
    _call("deltaw_product", _Product(m, at, of_bias, to, n, m.cols, m.rows, DTYPES[x.dtype], DTYPES[y.dtype]))


def reads_pairs() -> bool:
    """Whether the path that runs multiplies pairs of bf16: its products then take rows in bf16, else in float32."""
    library, at = _library()
    return bool(library.deltaw_reads_pairs(at))


def read_sum(values: Tensor) -> float:
    """Read `values` float32 once with the threads of the other kernels: a measure of bandwidth, not of the sum."""
    library, at = _library()
    found = ctypes.c_float()
    size = values.numel() * 4
    data = _pointer(checked("values", values, torch.float32, values.numel()))
    assert library.deltaw_read(at, torch.get_num_threads(), data, _i64(size), ctypes.byref(found)) == 0
    return found.value


def check_block(block: int) -> None:
    """Raise ShapeError unless the kernels can take blocks of this size: a power of two from 32 to 4096."""
    if not 32 <= block <= LONGEST_BLOCK or block & (block - 1):
        raise ShapeError(f"blocks of {block} values: the kernels take powers of two from 32 to {LONGEST_BLOCK}.")


def checked(name: str, tensor: Tensor, dtype: torch.dtype, n: int) -> int:
    """The address of `tensor`. Raises ShapeError unless it is contiguous, in CPU memory, of `dtype`, and holds n."""
    fits = tensor.dtype == dtype and tensor.numel() == n and tensor.is_contiguous() and tensor.is_cpu
    if not fits or dtype not in _KNOWN:
        raise ShapeError(
            f"{name} is {list(tensor.shape)} {tensor.dtype} on {tensor.device}, "
            f"contiguous: {tensor.is_contiguous()}.\n  The kernel needs {n} contiguous values of {dtype} on the CPU."
        )
    return tensor.data_ptr()


_KNOWN = (*DTYPES, torch.uint8)


def _dynamic(values: Tensor, codes: Tensor, absmax: Tensor, block: int, **more: Tensor) -> _Dynamic:
    n = values.numel()
    if block < 1:
        raise ShapeError(f"blocks of {block} values are not possible.")
    task = _Dynamic(
        values=checked("values", values, torch.float32, n),
        codes=checked("codes", codes, torch.uint8, n),
        absmax=checked("absmax", absmax, torch.float32, -(-n // block)),
        n=n, block=block,
    )  # fmt: skip
    if "cells" in more:
        task.cells = checked("cells", more["cells"], torch.uint8, 65536)
    if "table" in more:
        task.table = checked("table", more["table"], torch.float32, 256)
    return task


def _library() -> tuple[ctypes.CDLL, int]:
    found = running()
    assert found is not None, "callers ask running() first"
    return found


def _call(name: str, task: Any) -> None:
    if task.__class__ is not _Dequantise and task.n == 0:
        return
    library, at = _library()
    done = getattr(library, name)(at, torch.get_num_threads(), ctypes.byref(task))
    if done == 2:
        raise MemoryError(f"{name} found no memory")
    assert done == 0
