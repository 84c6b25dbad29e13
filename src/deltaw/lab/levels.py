"""Picture 4: the same real weights in each number format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deltaw.errors import BadInput
from deltaw.formats import BLOCKS, QUANTISED, BlockwiseWeight
from deltaw.lab.base import Lab
from deltaw.lab.controls import Controls, choice, controls, switch
from deltaw.lab.lowrank import target_controls
from deltaw.lab.picture import Plain, number, percent, rounded

FORMATS = ("fp16", "int8", "int4", "fp4", "nf4")
BINS = 81


def precision_controls(lab: Lab) -> type[Controls]:
    """Format, block, double quantisation, and the matrix."""
    blocks = [str(b) for b in BLOCKS]
    return controls(
        "Picture4",
        format=choice("nf4", FORMATS, "format", FORMATS),
        block=choice("64", blocks, "values that share a scale", ("64", "256"), ordered=True),
        double=switch(False, "double quantisation", (False, True)),
        **target_controls(lab, "q_proj", 0),
    )


def kept(W: Tensor, name: str, block: int, double: bool) -> BlockwiseWeight | None:
    """W [out, in] in a format; None for fp16, which has no blocks."""
    return None if name == "fp16" else QUANTISED[name].quantised(W, block=block, double_quant=double)


def bits_of(weight: BlockwiseWeight | None) -> tuple[float, float]:
    """(bits a value in all, those of them that are scales)."""
    if weight is None:
        return 16.0, 0.0
    n = weight.in_features * weight.out_features
    return 8 * weight.nbytes() / n, 8 * (weight.nbytes() - weight.codes.nbytes) / n


def dense_of(W: Tensor, weight: BlockwiseWeight | None) -> Tensor:
    """What the format holds, float32."""
    return W.half().float() if weight is None else weight.dense(torch.float32)


def precision(lab: Lab, c: Any) -> Plain:
    """Levels over a histogram of the weights, the error in each column, and all formats beside one another."""
    if c.format == "fp16" and c.double:
        raise BadInput("fp16 has no scales: double quantisation belongs to int8, int4, fp4 and nf4. Switch it off.")
    W, block = lab.weight(c.layer, c.target), int(c.block)
    chosen = kept(W, c.format, block, c.double)
    near = dense_of(W, chosen)
    columns = (W - near).norm(dim=0) / W.norm(dim=0).clamp_min(1e-30)
    rows = []
    for name in FORMATS:
        double = c.double and name != "fp16"
        other = kept(W, name, block, double)
        rows.append(
            {"format": name, "error": float((W - dense_of(W, other)).norm() / W.norm()), "bits": bits_of(other)[0]}
        )
    nf4 = kept(W, "nf4", block, False)
    assert nf4 is not None
    scaled = W.flatten() / nf4.absmax.repeat_interleave(block)[: W.numel()].clamp_min(1e-38)
    shares = torch.histc(scaled, BINS, -1.0, 1.0) / W.numel()
    table = [] if chosen is None else sorted(set(chosen.levels.table.tolist()))
    bits, scales = bits_of(chosen)
    error = float((W - near).norm() / W.norm())
    return {
        "numbers": [
            number("levels", "levels", len(table) if table else 65536),
            number("error", "error of the matrix", error, percent(error, 3)),
            number("bits", "bits a value", bits, f"{bits:.3f}"),
            number("scales", "of them scales", scales, f"{scales:.3f}"),
        ],
        "data": {
            "levels": table,
            "histogram": [{"at": -1 + 2 * (i + 0.5) / BINS, "share": s} for i, s in enumerate(rounded(shares))],
            "columns": rounded(columns),
            "formats": rows,
            "format": c.format,
            "block": block,
        },
    }
