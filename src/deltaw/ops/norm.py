"""Norms of the rows of a changed matrix W + s B A, without making that matrix.

W [out, in] frozen    A [r, in], B [out, r]    s a number
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from deltaw.core.weight import Weight
from deltaw.ops.rounds import rounds

_VALUES = 1 << 17  # of W at a time, dense: what is made of them leaves no large holes in the heap


def row_ranges(n: int, width: int) -> Iterator[tuple[int, int]]:
    """Ranges of a matrix's n rows of `width` values, so few that what is made of them is small."""
    return ((at.start, at.stop) for at in rounds(n, max(1, _VALUES // max(1, width))))


def row_squares(parts: Iterable[Tensor], n: int) -> Tensor:
    """The sum of squares of each of the `n` rows of W [n, in], given as some rows after the other: [n].

    float64 for float64, else float32.
    """
    found: Tensor | None = None
    first = 0
    for part in parts:
        wide = torch.float64 if part.dtype == torch.float64 else torch.float32
        found = part.new_empty(n, dtype=wide) if found is None else found
        torch.linalg.vector_norm(part, dim=1, dtype=wide, out=found[first : first + len(part)])
        first += len(part)
    assert found is not None, "a matrix has rows"
    return found.square_()


@torch.no_grad()
def row_norms(weight: Weight, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The norm of each row of W + s B A: [out], float64 for a float64 base, else float32. No gradient.

        |W_o + s B_o A|^2 = |W_o|^2 + 2 s (W A^T)_o . B_o + s^2 (B_o A A^T) . B_o

    |W_o|^2 is kept by the weight, so a call costs one product with r rows. Where W and the change cancel, the sum is no
    more exact than |W_o|^2 is: it is held above that rounding, and above zero, so that a quotient by it is finite.
    Compared with the norm of the whole matrix in float64 in tests/ops/test_ops_norm.py.
    """
    squares = weight.row_squares()
    wide = squares.dtype
    a, b = A.to(squares.device, wide), B.to(squares.device, wide)
    cross = weight.mul(a if wide == torch.float64 else a.to(weight.dtype)).T.to(wide)
    change = torch.addmm(cross, b, a @ a.T, beta=2 * scale, alpha=scale * scale)
    limits = torch.finfo(wide)
    least = squares * limits.eps + limits.tiny
    return torch.maximum(squares + (change * b).sum(1), least).sqrt_()
