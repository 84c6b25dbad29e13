"""The Affine normal form: what LoRA and its relatives are once their parameters are fixed.

    y = out_gain * (W (in_gain * x) + scale * B (A x)) + bias

    x         [..., in]      input of the linear map
    W         [out, in]      the frozen weight
    A         [r, in]        first factor;  B [out, r] second factor; both or none
    scale     number         alpha / r and the like
    out_gain  [out]          in_gain [in]; absent = ones
    bias      [out]          absolute; absent = the base's own bias, which no gain touches

Parameters stay in their own dtype (float32 as a rule); arithmetic runs in the dtype of W.
`apply` is in ops/affine.py: it is the part that must be fast.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deltaw.core.weight import Weight
from deltaw.errors import ShapeError, WorkFailed


@dataclass(frozen=True)
class Affine:
    """A change at one linear map. `drop` is applied to the input of A in training only."""

    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0
    out_gain: Tensor | None = None
    in_gain: Tensor | None = None
    bias: Tensor | None = None
    drop: float = 0.0

    @property
    def is_low_rank_only(self) -> bool:
        """Whether it is W x + scale * B A x and perhaps a bias, with no gains."""
        return self.out_gain is None and self.in_gain is None


def check(affine: Affine, weight: Weight, where: str) -> None:
    """Raise ShapeError unless every part of `affine` fits `weight`; `where` names the place."""
    n, m = weight.out_features, weight.in_features
    if (affine.A is None) != (affine.B is None):
        raise ShapeError(f"{where}: A and B come together; found only one of them.")
    r = affine.A.shape[0] if affine.A is not None else 0
    wanted = {"A": (r, m), "B": (n, r), "out_gain": (n,), "in_gain": (m,), "bias": (n,)}
    for part, shape in wanted.items():
        value = getattr(affine, part)
        if value is not None and tuple(value.shape) != shape:
            raise ShapeError(f"{where}: {part} has shape {tuple(value.shape)}, this place needs {shape}.")


def merged(affine: Affine, dense: Tensor, base_bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The plain linear map that equals the changed one: (W' [out, in], bias' [out] or None).

    dense    W as [out, in]; accumulation is in its dtype when that is float32 or float64, else in float32

    Raises WorkFailed when the result holds NaN or Inf. Inputs are not changed.
    """
    dtype = dense.dtype if dense.dtype in (torch.float32, torch.float64) else torch.float32
    w = dense.to(dtype)
    if affine.in_gain is not None:
        w = w * affine.in_gain.to(dtype)
    if affine.A is not None and affine.B is not None:
        w = torch.addmm(w, affine.B.to(dtype), affine.A.to(dtype), alpha=affine.scale)
    if affine.out_gain is not None:
        w = w * affine.out_gain.to(dtype).unsqueeze(1)
    bias = base_bias if affine.bias is None else affine.bias.to(dtype)
    for part, value in (("weight", w), ("bias", bias)):
        if value is not None and not bool(torch.isfinite(value).all()):
            raise WorkFailed(
                f"The merged {part} holds NaN or Inf: the adapter is broken. Nothing was written; "
                "train again with a lower learning rate or an earlier checkpoint."
            )
    return w, bias


def detached(affine: Affine) -> Affine:
    """The same change with every tensor cut from autograd."""
    parts = ("A", "B", "out_gain", "in_gain", "bias")
    return replace(affine, **{p: v.detach() for p in parts if (v := getattr(affine, p)) is not None})
