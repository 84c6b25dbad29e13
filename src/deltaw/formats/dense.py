"""The dense format: a plain matrix, in the orientation in which the base stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltaw.ops.norm import row_ranges, row_squares


class DenseWeight(nn.Module):
    """A frozen matrix W [out, in] that shares its memory with the base's own tensor.

    stored      [out, in], or [in, out] when `transposed` (GPT-2's Conv1D, embeddings)
    """

    stored: Tensor

    def __init__(self, stored: Tensor, transposed: bool = False) -> None:
        super().__init__()
        self.register_buffer("stored", stored.detach(), persistent=False)
        self.transposed = transposed
        self._squares: Tensor | None = None

    @staticmethod
    def planned(
        out_features: int,
        in_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        block: int = 64,
        double_quant: bool = False,
    ) -> tuple[int, int]:
        """Bytes of such a matrix in `dtype`, and of its constants: none. The other settings are quantised formats'."""
        return out_features * in_features * dtype.itemsize, 0

    @property
    def in_features(self) -> int:
        return self.stored.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.stored.shape[1 if self.transposed else 0]

    @property
    def dtype(self) -> torch.dtype:
        return self.stored.dtype

    def mul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., in] -> [..., out], in the one call that the base's own layer makes."""
        if not self.transposed:
            return F.linear(x, self.stored, bias)
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ self.stored if bias is None else torch.addmm(bias, flat, self.stored)
        return y.reshape(*x.shape[:-1], self.out_features)

    def mul_t(self, g: Tensor) -> Tensor:
        """g W: [..., out] -> [..., in]."""
        return F.linear(g, self.stored) if self.transposed else g @ self.stored

    def columns(self, ids: Tensor) -> Tensor:
        """Columns of W named by `ids` [...]: [..., out]."""
        return F.embedding(ids.to(self.stored.device), self.stored if self.transposed else self.stored.T)

    def dense(self, dtype: torch.dtype = torch.float32, room: Callable[[], Tensor] | None = None) -> Tensor:
        """W as [out, in] of `dtype`; its own memory where that is its dtype."""
        w = self.stored.T if self.transposed else self.stored
        return w.to(dtype)

    def parts(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """Rows of W as [n, in] of `dtype`; in its own memory where that is its dtype."""
        w = self.dense(self.dtype)
        return (w[first:last].to(dtype) for first, last in row_ranges(*w.shape))

    def native(self, dtype: torch.dtype) -> Tensor | None:
        """Its own memory, where that is in `dtype`."""
        return self.dense(dtype) if self.stored.dtype == dtype else None

    def row_squares(self) -> Tensor:
        """The sum of squares of each row of W: [out] float32 (float64 of a float64 matrix), computed once."""
        if self._squares is None:
            self._squares = row_squares(self.parts(self.dtype), self.out_features)
        return self._squares

    def _apply(self, fn: Any, recurse: bool = True) -> Self:  # every .to() passes here
        self._squares = None
        super()._apply(fn, recurse)
        return self

    def like(self, dense: Tensor) -> DenseWeight:
        """A new dense weight that holds `dense` [out, in] in this one's dtype and orientation."""
        w = dense.T if self.transposed else dense
        return DenseWeight(w.to(self.stored.dtype).contiguous(), self.transposed)

    def nbytes(self) -> int:
        """Bytes of the stored matrix."""
        return self.stored.numel() * self.stored.element_size()
