"""`FrozenLinear`: a linear map of the base whose weight is kept in a format of ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deltaw.core.site import SiteKind
from deltaw.core.weight import Weight


class FrozenLinear(nn.Module):
    """y = W x + b, W in any format. Takes the place of the base's own Linear or Conv1D when a base is quantised.

    kind   what the base's own module was: "linear" or "conv1d"
    """

    def __init__(self, frozen: Weight, bias: nn.Parameter | None, kind: SiteKind) -> None:
        super().__init__()
        self.frozen = frozen
        self.bias = bias
        self.kind = kind

    @property
    def in_features(self) -> int:
        return self.frozen.in_features

    @property
    def out_features(self) -> int:
        return self.frozen.out_features

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the weight, for code that asks for them; computing with it fails: it has no values."""
        return torch.empty(self.out_features, self.in_features, dtype=self.frozen.dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.frozen.mul(x, self.bias)

    def extra_repr(self) -> str:
        return f"{type(self.frozen).__name__}, in_features={self.in_features}, out_features={self.out_features}"
