"""Matrices in 4 or 8 bits: blocks of values, each scaled by its largest magnitude.

    value[i] = table[code[i]] * absmax[i // block]      values are taken row by row, flattened

Source: 8-bit optimizers (arXiv:2110.02861) section 2.1; QLoRA (arXiv:2305.14314) section 3. For 4 bits the bytes
are bitsandbytes': the first value of a pair sits in the high nibble, an odd count is padded with a zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NESTED_BLOCK = 256
"""absmax values that share one scale when absmax itself is quantised (double quantisation)."""

_CELLS = 65536
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
        assert self.table is not None and self.offset is not None
        n = len(self.absmax)
        scale = self.nested.repeat_interleave(NESTED_BLOCK)[:n]
        return self.table[self.absmax.long()] * scale + self.offset


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
    return quantise_reference(values, levels, block)


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
        codes[-1] = order[torch.bucketize(torch.zeros(1), bounds)]
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
    cells = torch.arange(_CELLS, dtype=torch.float64).mul_(2.0 / (_CELLS - 1)).sub_(1.0).float()
    code_of = torch.bucketize(cells, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    n = values.numel()
    padded = F.pad(values.reshape(-1).float(), (0, -n % block)).view(-1, block)
    absmax = padded.abs().amax(-1)
    scaled = (padded * (1.0 / absmax)[:, None]).clamp_(-1, 1)
    at = ((scaled + 1.0) * 0.5).double().mul_(_CELLS - 1).add_(0.5).float()  # one rounding, as a fused multiply-add
    codes = code_of[at.nan_to_num_(0.0).long().clamp_(max=_CELLS - 1)]
    codes[absmax == 0] = 0
    return codes.view(-1)[:n].contiguous(), absmax


def dequantise(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [out, in]: the product is taken in float32 and rounded once to `dtype`."""
    return dequantise_reference(blocks, dtype)


def dequantise_reference(blocks: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The slow, plain form of `dequantise`."""
    n = blocks.shape[0] * blocks.shape[1]
    codes = blocks.codes
    if blocks.levels.bits == 4:
        codes = torch.stack([codes >> 4, codes & 0xF], -1).reshape(-1)[:n]
    scale = blocks.scales.plain().repeat_interleave(blocks.block)[:n]
    return (blocks.levels.table[codes.long()] * scale).to(dtype).reshape(blocks.shape)


def mul(x: Tensor, blocks: Blocks, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: [..., in] -> [..., out] in x's dtype. Differentiable in x and bias."""
    y: Tensor = _Mul.apply(x, bias, blocks)
    return y


def mul_t(g: Tensor, blocks: Blocks) -> Tensor:
    """g W: [..., out] -> [..., in] in g's dtype."""
    return mul_t_reference(g, blocks)


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
        return mul_reference(x, blocks, bias)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        (g,) = grads
        dx = mul_t(g, ctx.blocks) if ctx.needs_input_grad[0] else None
        db = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, db, None
