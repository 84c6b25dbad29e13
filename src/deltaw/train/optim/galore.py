"""GaLore: AdamW on gradients that are projected to a few dimensions, for all weights at a fraction of the states.

    Q = the r leading singular vectors of G's shorter side, anew every T updates     G [m, n] the gradient of W
    R = G Q        [m, r], Q [n, r] right vectors, where m >= n
    R = Q^T G      [r, n], Q [m, r] left vectors, where m < n
    N = AdamW's step for R: its moments have R's shape and are kept when Q changes
    W -= lr wd W;  W += scale * (N Q^T or Q N)

Source: GaLore (arXiv:2403.03507), algorithm 2; its authors' galore_torch (GaLoreProjector of type std), with which
tests/train/test_train_galore.py compares. Three things differ. Decay comes before the update and eps after the bias
correction, as in AdamW. The sign of a singular vector is open, and moments outlive it: here its entry of largest
magnitude is positive, whatever LAPACK gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltaw.train.optim.adamw import AdamW8, AdamW32, Piece
from deltaw.train.optim.pages import Kind, Shape


class GaLore:
    """The rule for matrices that are `projected`; every other parameter is updated by `adam` as it is.

    adam          AdamW32 or AdamW8: the moments of R in 32 or 8 bits; Q is in the parameter's dtype in both
    projected     matrices with both sides above `rank`
    update_every  T: the first update of a matrix makes Q, and every T-th after it

    A projected matrix is updated by one thread on one core, all of it at once, so that the result depends neither on
    pages nor on the number of threads.
    """

    def __init__(
        self,
        adam: AdamW32 | AdamW8,
        projected: Iterable[Shape],
        *,
        rank: int,
        update_every: int,
        scale: float,
    ) -> None:
        self._adam = adam
        self._projected = {of.name: of for of in projected}
        assert all(len(of.sizes) == 2 and rank < min(of.sizes) for of in self._projected.values())
        self._rank, self._update_every, self._scale = rank, update_every, scale

    def kinds(self, of: Shape) -> tuple[Kind, ...]:
        if of.name not in self._projected:
            return self._adam.kinds(of)
        moments = self._adam.kinds(replace(of, sizes=(self._rank * max(of.sizes),)))
        projection = Kind("projection", of.dtype, self._rank * min(of.sizes))
        return tuple(replace(kind, per=None) for kind in (*moments, projection))

    def takes_whole(self, of: Shape) -> bool:
        return of.name in self._projected

    def scratch_bytes(self, n: int) -> int:
        """Beside AdamW's: R and N, or the Gram matrix in float64, its vectors and LAPACK's work space."""
        most = self._adam.scratch_bytes(n)
        for of in self._projected.values():
            small = self._rank * max(of.sizes)
            both = 2 * small * of.dtype.itemsize
            most = max(most, self._adam.scratch_bytes(small) + both, 32 * min(of.sizes) ** 2)
        return most

    def update(self, pieces: Sequence[Piece], group: dict[str, Any]) -> None:
        if plain := [p for p in pieces if "projection" not in p.states]:
            self._adam.update(plain, group)
        for piece in pieces:
            if "projection" in piece.states:
                self._update(piece, group)

    def _update(self, piece: Piece, group: dict[str, Any]) -> None:
        W, G = piece.value.view(piece.whole), piece.grad.view(piece.whole)
        m, n = piece.whole
        Q = piece.states["projection"].view(min(m, n), self._rank)
        if (int(piece.step) - 1) % self._update_every == 0:
            Q.copy_(leading_vectors(G, self._rank))
        R = G @ Q if m >= n else Q.T @ G
        N = torch.zeros_like(R)
        small = Piece(N.view(-1), R.view(-1), piece.step, piece.states, tuple(R.shape))
        self._adam.update([small], {**group, "weight_decay": 0.0})
        if group["weight_decay"]:
            W.mul_(1 - group["lr"] * group["weight_decay"])
        if m >= n:
            W.addmm_(N, Q.T, alpha=self._scale)
        else:
            W.addmm_(Q, N, alpha=self._scale)


def leading_vectors(G: Tensor, rank: int) -> Tensor:
    """The `rank` leading singular vectors of the shorter side of G [m, n]: [min(m, n), rank], the first one first.

    Right ones where m >= n, else left ones; of each, the entry of largest magnitude is positive. They are eigenvectors
    of G^T G or G G^T in float64: squaring halves the digits, and half of float64's are float32's. Measured beside
    torch.linalg.svd in docs/galore.md.
    """
    m, n = G.shape
    side = min(m, n)
    gram = torch.zeros(side, side, dtype=torch.float64, device=G.device)
    for part in torch.split(G, side, 0 if m >= n else 1):  # G is never there in float64 as a whole
        x = part.double() if m < n else part.double().T
        gram.addmm_(x, x.T)
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors.mul_(largest.sign()).to(G.dtype)
