"""Matrices in 4 or 8 bits: blocks of values, each scaled by its largest magnitude.

    value[i] = table[code[i]] * absmax[i // block]      values are taken row by row, flattened

Source: 8-bit optimizers (arXiv:2110.02861) section 2.1; QLoRA (arXiv:2305.14314) section 3. For 4 bits the bytes
are bitsandbytes': the first value of a pair sits in the high nibble, an odd count is padded with a zero.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.errors import ShapeError
from deltaw.ops import cuda
from deltaw.ops.native import calls, library, wide_calls
from deltaw.ops.rounds import rounds

NESTED_BLOCK = 256
"""absmax values that share one scale when absmax itself is quantised (double quantisation)."""

_CELLS = 65536
_FEW_ROWS = 64  # rows of x up to which the product reads the codes itself
_SCRATCH_BYTES = 8 << 20  # of W dense at a time, whatever its size
_PORTION = 1 << 20  # values quantised at a time: bounds the temporaries


@dataclass(frozen=True)
class Levels:
    """The values a code can take.

    bits    4 or 8
    table   [2**bits] float32 in [-1, 1]: the value of each code
    """

    bits: int
    table: Tensor

    def order(self) -> Tensor:
        """The codes sorted by value: [2**bits], int64."""
        return torch.argsort(self.table, stable=True)

    def bounds(self) -> Tensor:
        """Midpoints between neighbouring values: [2**bits - 1], ascending."""
        values = self.table[self.order()]
        return (values[:-1] + values[1:]) / 2


@dataclass(frozen=True)
class Scales:
    """One absmax per block, plain or quantised itself.

    absmax   [n_blocks] float32; or uint8 codes of `absmax - offset`
    nested   [ceil(n_blocks / 256)] float32, the absmax of those codes' blocks; None: plain
    table    [256] float32, the values of those codes
    offset   [] float32, the mean of the plain absmax
    """

    absmax: Tensor
    nested: Tensor | None = None
    table: Tensor | None = None
    offset: Tensor | None = None

    def plain(self) -> Tensor:
        """The absmax of each block: [n_blocks] float32."""
        if self.nested is None:
            return self.absmax
        assert self.table is not None
        assert self.offset is not None
        n = len(self.absmax)
        scale = self.nested.repeat_interleave(NESTED_BLOCK)[:n]
        return self.table.to(scale.device)[self.absmax.long()] * scale + self.offset


@dataclass(frozen=True)
class Blocks:
    """A matrix W [out, in] in 4 or 8 bits.

    codes   uint8 [ceil(out * in / 2)] for 4 bits, [out * in] for 8
    """

    codes: Tensor
    scales: Scales
    levels: Levels
    block: int
    shape: tuple[int, int]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # without `packed`'s pointers: a copy has its own


def dynamic_table() -> Tensor:
    """The signed dynamic 8-bit map of arXiv:2110.02861 section 1.3, as bitsandbytes builds it: [256] float32."""
    values: list[float] = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        means = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


def quantise(values: Tensor, levels: Levels, block: int) -> tuple[Tensor, Tensor]:
    """The nearest code of each value, and each block's absmax.

    values   any shape and float dtype, read row by row; the last block may be short
    returns  codes (uint8, packed two to a byte for 4 bits) and absmax [ceil(n / block)] float32

    A value half-way between two levels takes the lower one. NaN and infinity are the caller's to refuse.
    """
    if not _runs_native(values) or values.dtype not in calls.DTYPES:
        return quantise_reference(values, levels, block)
    order = levels.order().to(torch.uint8)
    return calls.quantise(values.detach().contiguous(), levels.bounds(), order, levels.bits, block)


def quantise_reference(values: Tensor, levels: Levels, block: int) -> tuple[Tensor, Tensor]:
    """The slow, plain form of `quantise`."""
    flat = values.reshape(-1)
    n = flat.numel()
    absmax = torch.empty(-(-n // block), dtype=torch.float32)
    codes = torch.empty(n + n % 2 if levels.bits == 4 else n, dtype=torch.uint8)
    order, bounds = levels.order().to(torch.uint8), levels.bounds()
    step = max(block, _PORTION // block * block)
    for start in range(0, n, step):
        part = flat[start : start + step].float()
        full = part.numel() // block * block
        largest = part[:full].reshape(-1, block).abs().amax(-1)
        scaled = part[:full].reshape(-1, block) * (1.0 / largest.clamp(min=1e-38))[:, None]
        scaled = scaled.clamp_(-1, 1).reshape(-1)
        if full < part.numel():  # bitsandbytes divides in a short last block, and keeps its absmax above zero
            last = part[full:].abs().max().clamp(min=1e-38)
            largest = torch.cat([largest, last[None]])
            scaled = torch.cat([scaled, (part[full:] / last).clamp_(-1, 1)])
        absmax[start // block : start // block + len(largest)] = largest
        codes[start : start + part.numel()] = order[torch.bucketize(scaled, bounds, out_int32=True).long()]
    if levels.bits == 8:
        return codes, absmax
    if n % 2:
        codes[-1] = order[torch.bucketize(torch.zeros(1, dtype=torch.float32), bounds)]
    return codes[0::2] << 4 | codes[1::2], absmax


def quantise_scales(absmax: Tensor) -> Scales:
    """Double quantisation: absmax in 8 bits around its mean, 256 to a scale (QLoRA section 3)."""
    offset = absmax.mean()
    codes, nested = quantise_dynamic(absmax - offset, dynamic_table(), NESTED_BLOCK)
    return Scales(codes, nested, dynamic_table(), offset)


def quantise_dynamic(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """8-bit codes of `values` [n] and each block's absmax, byte for byte as bitsandbytes' CPU code finds them.

    It looks the code up in 65,536 cells over [-1, 1], so near zero the code is that of the cell, not always the
    nearest level. A block of zeros has absmax 0 and codes 0.
    """
    if not _runs_native(values) or values.dtype not in calls.DTYPES:
        return quantise_dynamic_reference(values, table, block)
    flat = values.detach().reshape(-1).float().contiguous()
    codes, absmax = (
        torch.empty(flat.numel(), dtype=torch.uint8),
        torch.empty(-(-flat.numel() // block), dtype=torch.float32),
    )
    calls.quantise_dynamic(flat, _cells(tuple(table.tolist())), block, codes, absmax)
    return codes, absmax


@lru_cache(maxsize=4)
def _cells(table: tuple[float, ...]) -> Tensor:
    """The code of each of the 65,536 cells over [-1, 1]: uint8."""
    values = torch.tensor(table, dtype=torch.float32)
    cells = torch.arange(_CELLS, dtype=torch.float64).mul_(2.0 / (_CELLS - 1)).sub_(1.0).float()
    return torch.bucketize(cells, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def quantise_dynamic_reference(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The slow, plain form of `quantise_dynamic`."""
    code_of = _cells(tuple(table.tolist()))
    n = values.numel()
    padded = F.pad(values.reshape(-1).float(), (0, -n % block)).view(-1, block)
    absmax = padded.abs().amax(-1)
    scaled = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    at = ((scaled + 1.0) * 0.5).double().mul_(_CELLS - 1).add_(0.5).float()  # one rounding, as a fused multiply-add
    codes = code_of[at.nan_to_num_(0.0).long().clamp_(max=_CELLS - 1)]
    codes[absmax == 0] = 0
    return codes.view(-1)[:n].contiguous(), absmax


def dequantise(
    blocks: Blocks,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """W [out, in], or its rows from the first to before the second: the product is taken in float32 and rounded once.

    out   a contiguous tensor of that shape and `dtype` to fill; None, or where it cannot be used: a new one
    """
    first, last = rows or (0, blocks.shape[0])
    if blocks.codes.is_cuda and (dense := cuda.dequantise(blocks, dtype)) is not None:
        return dense[first:last]
    if not _suits(dtype, blocks):
        return dequantise_reference(blocks, dtype)[first:last]
    if out is None:
        out = torch.empty((last - first, blocks.shape[1]), dtype=dtype, device=blocks.codes.device)
    _fill(out, blocks, (first, last), (0, blocks.shape[1]))
    return out


def dequantise_reference(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slow, plain form of `dequantise`."""
    n = blocks.shape[0] * blocks.shape[1]
    codes, table = blocks.codes, blocks.levels.table.to(blocks.codes.device)
    if blocks.levels.bits == 4:
        codes = torch.stack([codes >> 4, codes & 0xF], -1).reshape(-1)[:n]
    scale = blocks.scales.plain().repeat_interleave(blocks.block)[:n]
    return (table[codes.long()] * scale).to(dtype).reshape(blocks.shape)


def mul(x: Tensor, blocks: Blocks, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., in] -> [..., out] in x's dtype. Differentiable in x and bias.

    Raises ShapeError if x's last size is not `in`.
    """
    _check_last(x, blocks.shape[1], blocks)
    if not (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))):
        return _product(x, blocks, bias)
    y: Tensor = _Mul.apply(x, bias, blocks)
    return y


def mul_t(g: Tensor, blocks: Blocks) -> Tensor:
    """g W: [..., out] -> [..., in] in g's dtype. Differentiable in g.

    Raises ShapeError if g's last size is not `out`.
    """
    _check_last(g, blocks.shape[0], blocks)
    if not (torch.is_grad_enabled() and g.requires_grad):
        return _product_t(g, blocks)
    x: Tensor = _MulT.apply(g, blocks)
    return x


def mul_reference(x: Tensor, blocks: Blocks, bias: Tensor | None = None) -> Tensor:
    """The slow, plain form of `mul`: the dequantised matrix in x's dtype, and one product."""
    return F.linear(x, dequantise_reference(blocks, x.dtype), bias)


def mul_t_reference(g: Tensor, blocks: Blocks) -> Tensor:
    """The slow, plain form of `mul_t`."""
    return g @ dequantise_reference(blocks, g.dtype)


class _Mul(torch.autograd.Function):
    """y = x W^T + b with a frozen W: dL/dx = g W, dL/db = the rows of g summed. Nothing is saved."""

    @staticmethod
    def forward(ctx, x, bias, blocks):  # type: ignore[no-untyped-def]
        ctx.blocks = blocks
        return _product(x, blocks, bias)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (g,) = grads
        dx = mul_t(g, ctx.blocks) if ctx.needs_input_grad[0] else None
        db = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None


class _MulT(torch.autograd.Function):
    """x = g W: dL/dg = (dL/dx) W^T."""

    @staticmethod
    def forward(ctx, g, blocks):  # type: ignore[no-untyped-def]
        ctx.blocks = blocks
        return _product_t(g, blocks)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (d,) = grads
        return (mul(d, ctx.blocks) if ctx.needs_input_grad[0] else None), None


# Behind them: which form runs, and how much of W is dense at a time ---------------------------------------------------


def _product(x: Tensor, blocks: Blocks, bias: Tensor | None) -> Tensor:
    """`mul` without autograd. Few rows: straight from the codes. Many: some rows of W at a time are made dense."""
    if blocks.codes.is_cuda and (y := cuda.mul(x, blocks, bias)) is not None:
        return y
    if not _suits(x.dtype, blocks) or (bias is not None and bias.dtype != x.dtype):
        return mul_reference(x, blocks, bias)
    out, cols = blocks.shape
    n = x.numel() // cols
    if n <= _FEW_ROWS:
        y = x.new_empty((*x.shape[:-1], out))
        if not x.is_meta:
            calls.product(x.contiguous(), packed(blocks), None if bias is None else bias.contiguous(), y)
        return y
    flat = x.reshape(n, cols).contiguous()
    y = x.new_empty((n, out))
    if _is_wide(flat):
        _fill_wide(y, flat, blocks, bias)
        return y.view(*x.shape[:-1], out)
    step = _portion(cols, out, x.element_size())
    scratch = x.new_empty(step * cols)
    for at in rounds(out, step):
        rows = at.stop - at.start
        w = scratch[: rows * cols].view(rows, cols)
        _fill(w, blocks, (at.start, at.stop), (0, cols))
        if bias is None:
            torch.mm(flat, w.T, out=y[:, at])
        else:
            torch.addmm(bias[at], flat, w.T, out=y[:, at])
    return y.view(*x.shape[:-1], out)


def _product_t(g: Tensor, blocks: Blocks) -> Tensor:
    """`mul_t` without autograd: some columns of W at a time, so that every sum is rounded once."""
    if not _suits(g.dtype, blocks):
        return g @ dequantise(blocks, g.dtype)
    out, cols = blocks.shape
    n = g.numel() // out
    flat = g.reshape(n, out).contiguous()
    x = g.new_empty((n, cols))
    if _is_wide(flat):
        _fill_wide(x, flat, blocks, None, back=True)
        return x.view(*g.shape[:-1], cols)
    step = _portion(out, cols, g.element_size())
    scratch = g.new_empty(step * out)
    for at in rounds(cols, step):
        width = at.stop - at.start
        w = scratch[: out * width].view(out, width)
        _fill(w, blocks, (0, out), (at.start, at.stop))
        torch.mm(flat, w, out=x[:, at])
    return x.view(*g.shape[:-1], cols)


def _is_wide(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.shape[1] % 2 == 0 and wide_calls.available()


def _fill_wide(y: Tensor, x: Tensor, blocks: Blocks, bias: Tensor | None, back: bool = False) -> None:
    """y = x W^T + bias, or x W: W is made dense a panel at a time, where the product reads it."""
    room = y.new_empty(wide_calls.room(len(y), [y.shape[1]]), dtype=torch.uint8)
    if len(y) and not y.is_meta:
        added = None if bias is None else bias.float().contiguous()
        wide_calls.products([wide_calls.Band(y, [wide_calls.Term(x, (packed(blocks), back))], added)], room)


def _portion(length: int, n: int, item_bytes: int) -> int:
    """How many of `n` rows (or columns) of `length` values are dense at a time."""
    fits = _SCRATCH_BYTES // (item_bytes * length) // 64 * 64
    parts = -(-n // max(64, fits))
    return min(n, -(-n // parts // 64) * 64)  # of about the same size


def _fill(out: Tensor, blocks: Blocks, rows: tuple[int, int], cols: tuple[int, int]) -> None:
    if not out.is_meta:
        calls.dequantise(packed(blocks), out, rows, cols)


def packed(blocks: Blocks) -> calls.Packed:
    """What the compiled kernels read of a matrix; valid while `blocks` lives. Raises ShapeError.

    Made once, and again where the memory of codes and scales is another.
    """
    s = blocks.scales
    at = blocks.codes.data_ptr(), s.absmax.data_ptr()
    known: tuple[tuple[int, int], calls.Packed] | None = blocks.__dict__.get("_packed")
    if known is not None and known[0] == at:
        return known[1]
    parts = (s.absmax,) if s.nested is None else (s.absmax, s.nested, s.table, s.offset)
    scales = [t for t in parts if t is not None]
    made = calls.pack(blocks.codes, blocks.levels.table, blocks.levels.bits, blocks.block, blocks.shape, scales)
    blocks.__dict__["_packed"] = at, made
    return made


def _runs_native(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and library.running() is not None


def _suits(dtype: torch.dtype, blocks: Blocks) -> bool:
    """Whether the native forms run; on the meta device their memory is traced, which is less than the reference's."""
    kind = blocks.codes.device.type
    return dtype in calls.DTYPES and kind in ("cpu", "meta") and library.running() is not None


def _check_last(x: Tensor, size: int, blocks: Blocks) -> None:
    if x.ndim == 0 or x.shape[-1] != size:
        raise ShapeError(f"a matrix of {list(blocks.shape)} needs a last size of {size}, not {list(x.shape)}.")
