"""The singular value decomposition of a change dW, cut to a lower rank: from its factors, or of the dense matrix.

    dW = U diag(S) V^T      the best approximation of rank r keeps the r largest of S (Eckart and Young, 1936);
                            its error in the Frobenius norm is the root of the sum of squares of the others

Everything is in float64; what is kept is rounded once, to float32. A [r, in] and B [out, r] with dW = B A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import BadInput, WorkFailed
from deltaw.ops.native.library import in_one_thread

Factors = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r]."""


@dataclass(frozen=True)
class Keep:
    """How much of a change is kept: at most `rank` singular values, and as few as hold the relative error at `error`.

    rank   None: as many as there are
    error  of the Frobenius norm, |dW - B A| / |dW|; None: as small as `rank` allows
    """

    rank: int | None = None
    error: float | None = None

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise BadInput(f"rank is {self.rank}; it must be at least 1.")
        if self.error is not None and not 0 <= self.error < 1:
            raise BadInput(f"error is {self.error}; it is a share of the change's norm: at least 0 and below 1.")

    def count(self, S: Tensor) -> int:
        """How many of the singular values S [k], largest first, are kept: at least 1."""
        most = len(S) if self.rank is None else min(self.rank, len(S))
        if self.error is None:
            return most
        lost = tails(S)
        return max(1, min(most, int((lost > self.error * lost[0]).sum())))


@dataclass(frozen=True)
class Cut:
    """A change as factors.

    A, B   [rank, in] and [out, rank] float32
    error  |dW - B A| / |dW| in the Frobenius norm, of the cut; rounding to float32 adds about 1e-7
    norm   |dW|
    """

    A: Tensor
    B: Tensor
    error: float
    norm: float

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]


def tails(S: Tensor) -> Tensor:
    """What is lost when the first 0, 1, ... k singular values of S [k] are kept: [k + 1], in the Frobenius norm."""
    squares = torch.cat([S.double().square(), S.new_zeros(1, dtype=torch.float64)])
    return squares.flip(0).cumsum(0).flip(0).sqrt()


def joined(parts: list[tuple[float, Factors]]) -> Factors:
    """The factors of the sum of w_i B_i A_i: the A below one another, the w_i B_i side by side. Exact, float64."""
    A = torch.cat([a.double() for _, (a, _) in parts])
    B = torch.cat([w * b.double() for w, (_, b) in parts], dim=1)
    return A, B


def whole(factors: Factors, where: str) -> Cut:
    """Factors as they are: nothing is lost. Raises WorkFailed, naming `where`, when they are not finite in float32."""
    A, B = factors
    _finite(where, A, B)
    core = torch.linalg.qr(B.double()).R @ torch.linalg.qr(A.double().T).R.T
    return _rounded(A, B, 0.0, float(torch.linalg.vector_norm(core)), where)


def cut_factors(factors: Factors, keep: Keep, where: str) -> Cut:
    """B A at a lower rank, without making it: with B = Q R and A^T = P T, the decomposition of R T^T [r, r].

    Raises WorkFailed, naming `where`, when a number is not finite.
    """
    A, B = (t.double() for t in factors)
    _finite(where, A, B)
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.T)
    U, S, Vt = torch.linalg.svd(R @ T.T, full_matrices=False)
    return _cut(Q @ U, S, Vt @ P.T, keep, where)


def cut_dense(delta: Tensor, keep: Keep, where: str) -> Cut:
    """A dense change [out, in] at a lower rank, by its exact decomposition. Raises WorkFailed as `cut_factors`."""
    delta = delta.double()
    _finite(where, delta)
    U, S, Vt = torch.linalg.svd(delta, full_matrices=False)
    return _cut(U, S, Vt, keep, where)


@dataclass(frozen=True)
class Directions:
    """The singular values of a matrix W [out, in], largest first, and its directions on the smaller side.

    values  [k] float64, where k is the smaller of out and in; below 1e-8 of the largest they are rounding
    axes    [k, k] float32: a direction of the inputs in each column, or of the outputs where out < in
    """

    values: Tensor
    axes: Tensor

    @property
    def nbytes(self) -> int:
        """What they take in memory."""
        return self.values.nbytes + self.axes.nbytes

    def factors(self, W: Tensor, rank: int) -> Factors:
        """(A, B) of the best approximation of `rank`: W as seen along the first directions."""
        axes = self.axes[:, :rank]
        return (axes.T @ W, axes) if W.shape[0] < W.shape[1] else (axes.T, W @ axes)


def directions(W: Tensor, where: str) -> Directions:
    """The whole decomposition of a dense matrix, from the eigenvectors of the smaller Gram matrix, in float64.

    A third of `cut_dense`'s time. Raises WorkFailed as `cut_factors`.
    """
    _finite(where, W)
    tall = W.T.double() if W.shape[0] < W.shape[1] else W.double()
    squares, axes = in_one_thread(lambda: torch.linalg.eigh(tall.T @ tall))
    return Directions(squares.flip(0).clamp_min(0).sqrt(), axes.flip(1).float())


def _cut(U: Tensor, S: Tensor, Vt: Tensor, keep: Keep, where: str) -> Cut:
    r, lost = keep.count(S), tails(S)
    root = S[:r].sqrt()
    norm = float(lost[0])
    return _rounded(root[:, None] * Vt[:r], U[:, :r] * root, float(lost[r]) / norm if norm else 0.0, norm, where)


def _rounded(A: Tensor, B: Tensor, error: float, norm: float, where: str) -> Cut:
    a, b = A.float().contiguous(), B.float().contiguous()
    _finite(where, a, b)
    return Cut(a, b, error, norm)


def _finite(where: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise WorkFailed(f"{where}: the change holds NaN or Inf, or overflows float32. Check its adapters and weights.")
