"""A place in a base model where a change can sit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

SiteKind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class LinearSite:
    """One linear map of a base model, in the canonical orientation y = W x with W [out, in].

    name          its module path, "model.layers.0.self_attn.q_proj"
    in_features   columns of W; an embedding is a linear map of one-hot vectors: its vocabulary
    out_features  rows of W
    kind          how the base stores it: "linear" [out, in], "conv1d" and "embedding" [in, out]
    has_bias      whether the base has a bias here
    is_head       whether it is the model's output embedding
    """

    name: str
    in_features: int
    out_features: int
    kind: SiteKind = "linear"
    has_bias: bool = False
    is_head: bool = False

    @property
    def role(self) -> str:
        """The last part of the name: "q_proj", "c_attn", "lm_head"."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """The number of the block it belongs to (the first number in its path), or None."""
        found = re.match(r".*?\.[^.]*\.(\d+)\.", "." + self.name)
        return int(found.group(1)) if found else None
