"""Where LoRA's factors can start instead of at noise and zero: from the base's weight, from its inputs, from what
quantisation lost. Each gives (A [r, in], B [out, r]) in float32 for y = W x + s * B (A x)."""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def principal(weight: Tensor, rank: int, scale: float) -> Factors:
    """PiSSA (arXiv:2404.02948, equations 2 and 3): s B A is the best approximation of W [out, in] of this rank.

    A = sqrt(S_r / s) V_r^T and B = U_r sqrt(S_r / s), by the exact SVD.
    """
    U, S, Vt = torch.linalg.svd(weight.double(), full_matrices=False)
    root = (S[:rank] / scale).sqrt()
    return (root[:, None] * Vt[:rank]).float(), (U[:, :rank] * root).float()


def orthonormal(weight: Tensor, rank: int) -> Factors:
    """OLoRA (arXiv:2406.01775, algorithm 1): B the first columns of Q and A the first rows of R, where W = Q R."""
    Q, R = torch.linalg.qr(weight.float())
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


def lost(source: Tensor, quantised: Tensor, rank: int, scale: float) -> Factors:
    """LoftQ (arXiv:2310.08659, equation 6, one round): s B A is the best approximation of W - Q(W) of this rank.

    One round, since the base stays the plain quantised one, which other adapters share.
    """
    return principal(source.to(quantised.device).float() - quantised.float(), rank, scale)


def explained(directions: Tensor, rank: int) -> Tensor:
    """EVA (arXiv:2410.07170, equation 2): A is the inputs' leading right singular vectors; B stays zero.

    directions  [k, in], k at least `rank`
    """
    return directions[:rank].float().clone()
