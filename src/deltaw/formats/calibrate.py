"""Codes chosen for the outputs: GPTQ (arXiv:2210.17323, algorithm 1) with the levels and blocks of our formats.

    X        inputs of the map, [tokens, in]
    H        X^T X / tokens + damping, [in, in]
    U        upper Cholesky factor of H^-1:  H^-1 = U^T U
    W, Q     [out, in]: what is rounded, and to what

The plain quantiser takes the level nearest to each value, which is best for W and not for W x. Here columns are rounded
one after the other, and what rounding column j did wrong is put right by those that are not rounded yet (equations 2
and 3 of the paper):

    q_j = nearest(w_j)      e = (w_j - q_j) / U[j, j]      w_k -= e U[j, k]   for k > j

which lowers the sum over rows of (w - q) H (w - q)^T. Scales come first, so that columns are rounded with the scales
that will be stored, double quantisation included, and blocks may run over a row's end: of each block the fraction of
its largest magnitude that rounds best, a value's error counted by 1 / U[j, j]^2, what it would cost if all later
columns made up for it. What is stored is the same format: any reader of it reads this.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from deltaw.errors import BaseError
from deltaw.formats.blockwise import BlockwiseWeight, check_block
from deltaw.ops.blockwise import Blocks, Levels, Scales, quantise_scales

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: the paper's."""

FRACTIONS = tuple(0.60 + 0.04 * i for i in range(13))
"""Of a block's largest magnitude that are tried as its scale: 0.60 to 1.08, 1.0 among them."""

_GROUP = 64  # columns whose errors go to the later ones in one product
_PORTION = 1 << 20  # values whose scales are searched at a time

Kind = TypeVar("Kind", bound=BlockwiseWeight)


def second_moment(x: Tensor) -> Tensor:
    """X^T X / tokens of inputs [..., in]: [in, in] float32.

    Raises BaseError for NaN or infinity.
    """
    rows = x.reshape(-1, x.shape[-1])
    found = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float32)
    for part in rows.split(4096):
        values = part.float()
        found.addmm_(values.T, values)
    if not bool(found.isfinite().all()):
        raise BaseError("its inputs hold NaN or infinity, or are beyond float32's range")
    return found.div_(len(rows))


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    """U [in, in] float32, upper triangular, with U^T U = H^-1, H = moment + damping * its mean diagonal.

    An input that is always zero counts for nothing, and its column is rounded by itself.
    """
    h = moment.to(torch.float64, copy=True)
    diagonal = h.diagonal()
    diagonal += damping * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor


def calibrated(
    kind: type[Kind], dense: Tensor, factor: Tensor, dtype: torch.dtype, block: int = 64, double_quant: bool = False
) -> Kind:
    """`dense` [out, in] in the format `kind`, with codes and scales chosen for the inputs behind `factor`.

    factor  `inverse_factor` of the map's inputs, [in, in]
    dtype   in which the weight computes
    block, double_quant  as `BlockwiseWeight.quantised` takes them

    Raises BaseError for a matrix that cannot be quantised.
    """
    check_block(block)
    if not all(bool(t.isfinite()) for t in dense.aminmax()):
        raise BaseError("a matrix with NaN or infinity cannot be quantised.")
    w = dense.float()
    absmax = best_scales(w, kind.levels, block, factor.diagonal() ** -2)
    scales = quantise_scales(absmax) if double_quant else Scales(absmax)
    codes = pack(round_columns(w, kind.levels, scales.plain(), block, factor), kind.levels)
    return kind(Blocks(codes, scales, kind.levels, block, (w.shape[0], w.shape[1])), dtype)


def best_scales(w: Tensor, levels: Levels, block: int, cost: Tensor) -> Tensor:
    """The scale of each block of w [out, in] among FRACTIONS of its largest magnitude: [n_blocks] float32.

    cost    [in]: of a column's squared error
    """
    flat, cols = w.reshape(-1), w.shape[1]
    found = []
    for start in range(0, len(flat), _PORTION):
        values = flat[start : start + _PORTION]
        found.append(_best(values, cost[torch.arange(start, start + len(values)) % cols], levels, block))
    return torch.cat(found)


def _best(values: Tensor, costs: Tensor, levels: Levels, block: int) -> Tensor:
    """`best_scales` of some whole blocks; the last may be short."""
    short = -len(values) % block
    values, costs = (torch.nn.functional.pad(t, (0, short)).view(-1, block) for t in (values, costs))
    largest = values.abs().amax(1)
    least, best = torch.full_like(largest, torch.inf), largest.clone()
    for fraction in FRACTIONS:
        scale = largest * fraction
        error = ((nearest(values, scale[:, None], levels)[1] - values).square_().mul_(costs)).sum(1)
        better = error < least
        least[better], best[better] = error[better], scale[better]
    return best


def nearest(values: Tensor, scale: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Of each value the place among the sorted levels (int64), and what it then stands for, in float32."""
    part = (values / scale).nan_to_num_(0.0).clamp_(-1, 1)
    place = torch.bucketize(part, levels.bounds())
    return place, levels.table[levels.order()][place] * scale


def round_columns(w: Tensor, levels: Levels, scales: Tensor, block: int, factor: Tensor) -> Tensor:
    """The code of each value of w [out, in]: uint8 [out * in], one to a byte, row by row.

    scales  [n_blocks]
    """
    out, cols = w.shape
    left = w.T.contiguous()  # a column of W is a row here
    by_value = scales.repeat_interleave(block)[: w.numel()].view(out, cols).T.contiguous()
    places = torch.empty(cols, out, dtype=torch.uint8)
    for start in range(0, cols, _GROUP):
        end = min(start + _GROUP, cols)
        errors = torch.empty(end - start, out, dtype=torch.float32)
        for j in range(start, end):
            places[j], stands_for = nearest(left[j], by_value[j], levels)
            error = torch.div(left[j] - stands_for, factor[j, j], out=errors[j - start])
            left[j + 1 : end].addr_(factor[j, j + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return levels.order().to(torch.uint8)[places.T.long()].reshape(-1)


def pack(codes: Tensor, levels: Levels) -> Tensor:
    """One code to a byte as a format keeps them: for 4 bits two to a byte, an odd count padded with the code of 0."""
    if levels.bits == 8:
        return codes
    if len(codes) % 2:
        zero = levels.order()[torch.bucketize(torch.zeros(1, dtype=torch.float32), levels.bounds())]
        codes = torch.cat([codes, zero.to(torch.uint8)])
    return codes[0::2] << 4 | codes[1::2]
