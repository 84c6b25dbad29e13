"""What runs on a GPU by other kernels than plain PyTorch's: products of `ops.blockwise`, and attention over a pack.

Products are bitsandbytes' kernels on the same bytes, imported when called: NF4 and FP4 take its fused 4-bit product, 8
bits its blockwise dequantise and a dense product. Other levels (int4) take plain PyTorch on the device. Attention in 16
bits is PyTorch's flash attention over documents of unlike length.
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


# Attention ------------------------------------------------------------------------------------------------------------

_POSITIONAL = {"_flash_attention_forward": 10, "_flash_attention_backward": 14}


@lru_cache(maxsize=1)
def _flash_is_known() -> bool:
    """Whether this PyTorch's operators of flash attention, which are not public, take what `flash` gives them."""
    for name, wanted in _POSITIONAL.items():
        op = getattr(torch.ops.aten, name, None)
        if op is None or sum(not a.kwarg_only for a in op.default._schema.arguments) != wanted:
            return False
    return True


def suits_flash(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> bool:
    """Whether `flash` computes this: 16-bit floats, at most 256 features in eights, no softcap, Ampere or newer."""
    return (
        q.is_cuda
        and {q.dtype, k.dtype, v.dtype} in ({torch.bfloat16}, {torch.float16})
        and k.shape == v.shape
        and q.shape[-1] <= 256
        and q.shape[-1] % 8 == 0
        and softcap is None
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and _flash_is_known()
    )


def flash(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None) -> tuple[Tensor, Tensor]:
    """(o [T, H, D], lse float32 [H, T]) of `ops.attention.attend`, by PyTorch's flash attention over documents."""
    at, longest = _documents(bounds, q)
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, at, at, longest, longest, 0.0, True, False, scale=scale, **_seen(window)
    )
    return o, lse


def flash_backward(
    g: Tensor, rows: tuple[Tensor, ...], lse: Tensor, bounds: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of `ops.attention.attend_backward`; rows: q, k, v, o. Sums of dq are in no fixed order."""
    q, k, v, o = rows
    at, longest = _documents(bounds, q)
    state, unused = (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.empty(0, device=q.device, dtype=torch.float32),
    )
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        g, q, k, v, o, lse, at, at, longest, longest, 0.0, True, state, unused, scale=scale, **_seen(window)
    )
    return found


def _documents(bounds: Tensor, q: Tensor) -> tuple[Tensor, int]:
    return bounds.to(q.device, torch.int32), int(bounds.diff().max())


def _seen(window: int | None) -> dict[str, int]:
    return {} if window is None else {"window_size_left": max(1, window) - 1, "window_size_right": 0}
