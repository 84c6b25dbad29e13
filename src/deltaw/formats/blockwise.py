"""What the 4 and 8 bit formats share: a frozen matrix in blocks of codes with a scale each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.errors import BaseError, near
from deltaw.ops.blockwise import (
    NESTED_BLOCK,
    Blocks,
    Levels,
    Scales,
    dequantise,
    dynamic_table,
    mul,
    mul_t,
    packed,
    quantise,
    quantise_scales,
)
from deltaw.ops.native.calls import Packed
from deltaw.ops.norm import row_ranges, row_squares

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes knows too."""

_DYNAMIC = dynamic_table()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class BlockwiseWeight(nn.Module):
    """A frozen matrix W [out, in] whose values are codes times their block's absmax. Built by `quantised`.

    codes     uint8, two to a byte for 4 bits
    absmax    [n_blocks] float32; uint8 with double quantisation
    nested    [ceil(n_blocks / 256)] float32 and offset [] float32: double quantisation's own constants, or None

    Values are taken row by row of [out, in], in blocks that may run over a row's end. A GPT-2 Conv1D weight is
    quantised as [out, in] too, as bitsandbytes does.
    """

    name: ClassVar[str]
    levels: ClassVar[Levels]
    tool: ClassVar[str]  # who defined the bytes: part of the serialised key

    codes: Tensor
    absmax: Tensor
    nested: Tensor | None
    offset: Tensor | None

    def __init__(self, blocks: Blocks, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = blocks.shape
        self.block = blocks.block
        self.dtype = dtype
        self._squares: Tensor | None = None
        self._blocks: Blocks | None = None
        for key, value in (
            ("codes", blocks.codes),
            ("absmax", blocks.scales.absmax),
            ("nested", blocks.scales.nested),
            ("offset", blocks.scales.offset),
        ):
            self.register_buffer(key, value, persistent=False)

    @classmethod
    def quantised(
        cls, dense: Tensor, dtype: torch.dtype | None = None, block: int = 64, double_quant: bool = False
    ) -> Self:
        """The nearest weight of this format to `dense` [out, in].

        dtype         in which it computes; None: dense's own
        block         values that share a scale: a power of two from 32 to 4096
        double_quant  keep the scales in 8 bits too (QLoRA section 3): 0.5 -> 0.127 bits a value at block 64

        Raises BaseError for another block size, an empty matrix, NaN or infinity (in float32 too).
        """
        check_block(block)
        if dense.numel() == 0 or dense.ndim != 2 or dense.dtype not in _DTYPES.values():
            raise BaseError(f"a {dense.dtype} matrix of shape {list(dense.shape)} cannot be quantised.")
        if not all(bool(t.isfinite()) for t in dense.aminmax()):
            raise BaseError("a matrix with NaN or infinity cannot be quantised.")
        codes, absmax = quantise(dense.contiguous(), cls.levels, block)
        scales = quantise_scales(absmax) if double_quant else Scales(absmax)
        if not _all_finite(scales):
            raise BaseError(f"a matrix with values up to {float(dense.abs().max()):.3g} is beyond float32's range.")
        blocks = Blocks(codes, scales, cls.levels, block, (dense.shape[0], dense.shape[1]))
        return cls(blocks, dtype or dense.dtype)

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        block: int = 64,
        double_quant: bool = False,
    ) -> Self:
        """Such a matrix on the meta device: it has shapes, and its products trace the memory of real ones."""
        n = out_features * in_features
        n_blocks = -(-n // block)
        with torch.device("meta"):
            codes = torch.empty(-(-n * cls.levels.bits // 8), dtype=torch.uint8)
            scales = Scales(torch.empty(n_blocks, dtype=torch.float32))
            if double_quant:
                nested = torch.empty(-(-n_blocks // NESTED_BLOCK), dtype=torch.float32)
                scales = Scales(
                    torch.empty(n_blocks, dtype=torch.uint8), nested, _DYNAMIC, torch.empty((), dtype=torch.float32)
                )
        return cls(Blocks(codes, scales, cls.levels, block, (out_features, in_features)), dtype)

    @property
    def double_quant(self) -> bool:
        return self.nested is not None

    @property
    def blocks(self) -> Blocks:
        """The matrix as `ops.blockwise` takes it: the same one until the codes or their scales are other tensors."""
        codes, absmax, known = self.codes, self.absmax, self._blocks
        if known is None or known.codes is not codes or known.scales.absmax is not absmax:
            table = _DYNAMIC if self.double_quant else None
            scales = Scales(absmax, self.nested, table, self.offset)
            known = Blocks(codes, scales, self.levels, self.block, (self.out_features, self.in_features))
            self._blocks = known
        return known

    def mul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., in] -> [..., out]; W as dequantised to x's dtype."""
        return mul(x, self.blocks, bias)

    def mul_t(self, g: Tensor) -> Tensor:
        """g W: [..., out] -> [..., in]."""
        return mul_t(g, self.blocks)

    def columns(self, ids: Tensor) -> Tensor:
        """Columns of W named by `ids` [...]: [..., out]."""
        return F.embedding(ids.to(self.codes.device), self.dense(self.dtype).T)

    def dense(self, dtype: torch.dtype = torch.float32, room: Callable[[], Tensor] | None = None) -> Tensor:
        """W dequantised, [out, in], in `room()` if that is given."""
        return dequantise(self.blocks, dtype, None if room is None else room())

    def parts(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Rows of W dequantised, [n, in]."""
        return (dequantise(self.blocks, dtype, rows=rows) for rows in row_ranges(self.out_features, self.in_features))

    def native(self, dtype: torch.dtype) -> Packed | None:
        """Pointers to the codes, valid while this weight lives and stays where it is."""
        if self.codes.is_meta:  # traced: nobody reads it
            return Packed(rows=self.out_features, cols=self.in_features)
        return packed(self.blocks) if self.codes.device.type == "cpu" else None

    def row_squares(self) -> Tensor:
        """The sum of squares of each row of W as it computes: [out] float32 (float64 in float64), computed once."""
        if self._squares is None:
            self._squares = row_squares(self.parts(self.dtype), self.out_features)
        return self._squares

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # every .to() passes here
        self._squares = self._blocks = None
        super()._apply(fn, recurse)
        return self

    def like(self, dense: Tensor) -> Self:
        """`dense` [out, in] in this format, with this one's block size and double quantisation."""
        return type(self).quantised(dense, self.dtype, self.block, self.double_quant)

    def nbytes(self) -> int:
        """Bytes of codes and constants; the tables are shared by all weights of a format."""
        return sum(t.numel() * t.element_size() for t in self.buffers())

    # As bitsandbytes writes it (FORMATS.md 1.2) ----------------------------------------------------

    def entries(self) -> dict[str, Tensor]:
        """What a checkpoint holds for this matrix, by the part of the key behind "<module>."."""
        state: dict[str, Any] = {
            "quant_type": self.name,
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        found = {
            "weight": self.codes.view(-1, 1),
            "weight.absmax": self.absmax,
            "weight.quant_map": self.levels.table.clone(),
        }
        if self.nested is not None and self.offset is not None:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(self.offset)}
            found |= {"weight.nested_absmax": self.nested, "weight.nested_quant_map": _DYNAMIC.clone()}
        packed = json.dumps(state).encode()
        return found | {f"weight.{self.state_key()}": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}

    @classmethod
    def state_key(cls) -> str:
        """The key of the JSON part: "quant_state.bitsandbytes__nf4"."""
        return f"quant_state.{cls.tool}__{cls.name}"

    @classmethod
    def from_entries(cls, entries: dict[str, Tensor], dtype: torch.dtype | None = None) -> Self:
        """The weight that `entries` (as `entries` gives them, or bitsandbytes wrote them) hold.

        dtype   in which it computes; None: the one that the entries name

        Raises BaseError saying what is missing, damaged or of another kind.
        """
        state = _read_state(entries, f"weight.{cls.state_key()}")
        try:
            out_features, in_features = (int(n) for n in state["shape"])
            block, own = state["blocksize"], _DTYPES[state["dtype"]]
        except (KeyError, TypeError, ValueError, OverflowError) as problem:
            raise BaseError(f"its quant_state lacks or garbles {problem}: {state}") from problem
        check_block(block)
        if min(out_features, in_features) < 1:
            raise BaseError(f"its quant_state names an impossible shape: {state['shape']}")
        if state.get("quant_type") != cls.name:
            raise BaseError(f"its quant_state says {state.get('quant_type')!r} under the key of {cls.name!r}")
        n = out_features * in_features
        n_blocks = -(-n // block)
        codes = _part(entries, "weight", None, -(-n * cls.levels.bits // 8)).contiguous()
        _same_table(entries, "weight.quant_map", cls.levels.table)
        if "weight.nested_absmax" not in entries:
            scales = Scales(_part(entries, "weight.absmax", torch.float32, n_blocks))
        else:
            offset = state.get("nested_offset")
            if state.get("nested_blocksize") != NESTED_BLOCK or not isinstance(offset, float):
                raise BaseError(f"its quant_state names no offset or other nested blocks than {NESTED_BLOCK}: {state}")
            _same_table(entries, "weight.nested_quant_map", _DYNAMIC)
            scales = Scales(
                _part(entries, "weight.absmax", torch.uint8, n_blocks),
                _part(entries, "weight.nested_absmax", torch.float32, -(-n_blocks // NESTED_BLOCK)),
                _DYNAMIC,
                torch.tensor(offset, dtype=torch.float32),
            )
        if not _all_finite(scales):
            raise BaseError("its constants hold NaN or infinity")
        return cls(Blocks(codes, scales, cls.levels, block, (out_features, in_features)), dtype or own)


def check_block(block: int) -> None:
    """Raise BaseError for a block size that is not one of BLOCKS."""
    if type(block) is not int or block not in BLOCKS:
        raise BaseError(f"a block of {block!r} values is not possible.\n  Take one of {', '.join(map(str, BLOCKS))}.")


def _all_finite(scales: Scales) -> bool:
    constants = [t for t in (scales.absmax, scales.nested, scales.offset) if t is not None]
    return all(bool(t.isfinite().all()) for t in constants if t.is_floating_point())


def _read_state(entries: dict[str, Tensor], key: str) -> dict[str, Any]:
    if key not in entries:
        raise BaseError(f"it has no {key}.{near(key, entries)}")
    try:
        state = json.loads(bytes(entries[key].reshape(-1).view(torch.uint8).tolist()).decode())
    except (ValueError, RecursionError) as problem:
        raise BaseError(f"its {key} is not JSON: {problem}") from problem
    if not isinstance(state, dict):
        raise BaseError(f"its {key} holds a JSON {type(state).__name__}, not an object")
    return state


def _part(entries: dict[str, Tensor], key: str, dtype: torch.dtype | None, size: int) -> Tensor:
    """Entry `key` as [size]; dtype None: bytes, in whatever dtype they are stored."""
    if key not in entries:
        raise BaseError(f"it has no {key}")
    found = entries[key].reshape(-1)
    found = found.view(torch.uint8) if dtype is None else found
    if found.numel() != size or (dtype is not None and found.dtype != dtype):
        want = f"{size} of {dtype or torch.uint8}"
        raise BaseError(f"its {key} holds {found.numel()} values of {found.dtype}, not {want}")
    return found


def _same_table(entries: dict[str, Tensor], key: str, table: Tensor) -> None:
    found = entries.get(key)
    if found is None or found.numel() != table.numel() or not torch.allclose(found.float().view(-1), table, atol=1e-6):
        raise BaseError(f"its {key} is missing or holds other levels than the format's")
