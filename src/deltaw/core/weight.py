"""What a frozen matrix must offer, whatever format its bytes are in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Weight(Protocol):
    """A frozen matrix W [out, in] in some format. It holds buffers, so no optimizer can reach it.

    A format is one class that implements this; adding a format touches no method and no layer.
    """

    @property
    def in_features(self) -> int:
        """Columns of W."""

    @property
    def out_features(self) -> int:
        """Rows of W."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it computes."""

    def mul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., in] -> [..., out]. Differentiable in x and bias; W never gets a gradient.

        The sum is rounded as the base's own layer rounds it, so that a zero change is exactly the base.
        """

    def mul_t(self, g: Tensor) -> Tensor:
        """g W: [..., out] -> [..., in], the gradient of `mul` with respect to x."""

    def columns(self, ids: Tensor) -> Tensor:
        """The columns of W that `ids` [...] name: [..., out]; what an embedding looks up."""

    def dense(self, dtype: torch.dtype = torch.float32, room: Callable[[], Tensor] | None = None) -> Tensor:
        """W as a plain [out, in] tensor of `dtype`; may share memory with W: do not write into it.

        room   gives a contiguous [out, in] tensor of `dtype` to fill, where a new one would be made
        """

    def parts(self, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
        """The rows of `dense`, in order, a MB or less at a time: each [n, in]. Do not write into them."""

    def native(self, dtype: torch.dtype) -> Any:
        """Where the compiled products find W in `dtype`: a tensor [out, in] in any strides, pointers to its codes
        (`ops.native.calls.Packed`), or None where they cannot read it.
        """

    def row_squares(self) -> Tensor:
        """The sum of squares of each row of W: [out] float32 (float64 of a float64 matrix). Do not write into it."""

    def like(self, dense: Tensor) -> Weight:
        """A new weight of the same format and orientation that holds `dense` [out, in]."""

    def nbytes(self) -> int:
        """Bytes that this weight keeps in memory, constants included."""
