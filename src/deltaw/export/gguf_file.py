"""A GGUF file written tensor by tensor, whole or not at all (the gguf package's writer)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from deltaw.errors import BadInput, WorkFailed, near
from deltaw.store.files import whole_file

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FILE_TYPES = {
    "float32": gguf.LlamaFileType.ALL_F32,
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "bfloat16": gguf.LlamaFileType.MOSTLY_BF16,
}
_NUMPY: dict[torch.dtype, Any] = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}
_GGML = {
    torch.float32: gguf.GGMLQuantizationType.F32,
    torch.float16: gguf.GGMLQuantizationType.F16,
    torch.bfloat16: gguf.GGMLQuantizationType.BF16,
}


@dataclass(frozen=True)
class Entry:
    """A tensor that will be written: in numpy's order of axes, which GGUF turns round."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def check_dtype(dtype: str) -> torch.dtype:
    """The torch dtype called `dtype`. Raises BadInput for one that is not written."""
    if dtype not in DTYPES:
        raise BadInput(f"unknown dtype {dtype!r}.{near(dtype, DTYPES)} Known: {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def write_gguf(
    out: Path, arch: str, settings: Sequence[tuple[str, tuple[Any, ...]]], entries: Sequence[Entry],
    values: Iterable[Tensor],
) -> int:  # fmt: skip
    """Write a GGUF file at `out`; one tensor is in memory at a time. Returns its size in bytes.

    settings  methods of gguf.GGUFWriter without their "add_", and what they take, in the file's order
    values    the tensors of `entries`, in their order; rounded here

    Raises WorkFailed: a value that is not finite in its dtype, a full disk.
    """
    with whole_file(out) as aside:
        writer = gguf.GGUFWriter(aside, arch)
        try:
            for method, arguments in settings:
                getattr(writer, f"add_{method}")(*arguments)
            for e in entries:
                n_bytes = int(np.prod(e.shape)) * e.dtype.itemsize
                writer.add_tensor_info(e.name, e.shape, np.dtype(_NUMPY[e.dtype]), n_bytes, raw_dtype=_GGML[e.dtype])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            assert writer.fout is not None
            file = writer.fout[0]  # not writer.write_tensor_data: its numpy.tofile keeps quiet about a full disk
            for e, value in zip(entries, values, strict=True):
                writer.write_padding(file, file.tell())
                file.write(_plain(e, value).data)
            writer.write_padding(file, file.tell())
        finally:
            writer.close()
        return aside.stat().st_size


def _plain(entry: Entry, value: Tensor) -> np.ndarray[Any, Any]:
    assert tuple(value.shape) == entry.shape, f"{entry.name}: {tuple(value.shape)}, planned {entry.shape}"
    rounded = value.to(entry.dtype).contiguous()
    if not bool(torch.isfinite(rounded).all()):
        raise WorkFailed(
            f"{entry.name}: NaN or Inf in {str(entry.dtype).removeprefix('torch.')}. Nothing was written; check the "
            "adapter, or choose --dtype bfloat16 or float32, which hold larger values."
        )
    return (rounded.view(torch.int16) if entry.dtype == torch.bfloat16 else rounded).numpy()
