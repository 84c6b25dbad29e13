"""The products of `ops.blockwise` on a GPU: bitsandbytes' kernels on the same bytes. Optional: imported when called.

NF4 and FP4 take its fused 4-bit product, 8 bits its blockwise dequantise and a dense product. Other levels (int4) take
plain PyTorch on the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.errors import WorkFailed

if TYPE_CHECKING:
    from deltaw.ops.blockwise import Blocks


def dequantise(blocks: Blocks, dtype: torch.dtype) -> Tensor | None:
    """W [out, in], or None for levels that bitsandbytes does not know. Raises WorkFailed without bitsandbytes."""
    ops, kind = _ops(), _quant_type(tuple(blocks.levels.table.tolist()))
    absmax = blocks.scales.plain()
    if kind is not None:
        shape = list(blocks.shape)
        dense: Tensor = ops.dequantize_4bit(blocks.codes.view(-1, 1), absmax, blocks.block, kind, shape, dtype)
        return dense
    if blocks.levels.bits == 8:
        table = blocks.levels.table.to(absmax.device)
        flat: Tensor = ops.dequantize_blockwise(blocks.codes, absmax, table, blocks.block, dtype)
        return flat.view(blocks.shape)
    return None


def mul(x: Tensor, blocks: Blocks, bias: Tensor | None) -> Tensor | None:
    """x W^T + bias, or None as `dequantise` says it. Raises WorkFailed without bitsandbytes."""
    ops, kind = _ops(), _quant_type(tuple(blocks.levels.table.tolist()))
    if kind is None:
        dense = dequantise(blocks, x.dtype)
        return None if dense is None else F.linear(x, dense, bias)
    s = blocks.scales
    nested: dict[str, Any] = {}
    if s.nested is not None and s.table is not None:
        nested = {"absmax_8bit": s.absmax, "absmax_code": s.table.to(x.device), "absmax_offset": s.offset}
    absmax = s.absmax if s.nested is None else s.nested
    codes, shape = blocks.codes.view(-1, 1), list(blocks.shape)
    y: Tensor = ops.gemm_4bit(x.contiguous(), codes, shape, absmax, blocks.block, kind, bias=bias, **nested)
    return y


def _ops() -> Any:
    try:
        import bitsandbytes  # noqa: F401  (registers its operators)
    except ImportError as problem:
        raise WorkFailed(
            "4 and 8 bit weights on a GPU need bitsandbytes, which is not installed.\n"
            "  pip install 'bitsandbytes>=0.50,<0.51'"
        ) from problem
    return torch.ops.bitsandbytes


@lru_cache(maxsize=8)
def _quant_type(table: tuple[float, ...]) -> str | None:
    """What bitsandbytes calls these levels."""
    from bitsandbytes.functional import get_4bit_type

    known = {kind: tuple(get_4bit_type(kind, device="cpu").tolist()) for kind in ("nf4", "fp4")}
    return next((kind for kind, levels in known.items() if levels == table), None)
