"""Prefix tuning (arXiv:2101.00190).

    K' = [P_K, K]    V' = [P_V, V]                    in every layer: n learned keys and values before the tokens' own
    P = E                                             E [n, 2 * layers * d], or with `projection` (section 4.3)
    P = W2 tanh(W1 E + b1) + b2                       E [n, d], W1 [hidden, d], W2 [2 * layers * d, hidden]

d is the width of a token's keys: key-value heads * features of a head. Keys are as attention sees them, after any
rotation. The network trains better and is not saved: P alone is. P starts small (deviation 0.1): large keys and values,
as PEFT's are, would drown those of the tokens. Count: n * 2 * layers * d saved; with `projection`
n * d + hidden * (d + 1) + 2 * layers * d * (hidden + 1) train. It does not start at the base: any key takes attention.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from deltaw.core.site import VirtualSite
from deltaw.core.spec import Params, Start
from deltaw.methods.virtual import Virtual, fresh_params, linear_shapes


class PrefixTuning(Virtual):
    """Settings of prefix tuning; those of `Virtual` and

    projection  a two-layer network makes the prefix while it trains
    hidden      its width; None: that of a token's keys
    """

    name: ClassVar[str] = "prefix"
    sits: ClassVar[Literal["linear", "block", "input", "cache"]] = "cache"
    lr: ClassVar[float] = 3e-3
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    plain: ClassVar[dict[str, Any]] = {"projection": False, "hidden": None}

    projection: bool = True
    hidden: int | None = None

    @model_validator(mode="after")
    def _hidden_belongs_to_the_projection(self) -> PrefixTuning:
        if self.hidden is not None and (not 1 <= self.hidden <= 2**24 or not self.projection):
            raise ValueError(
                "hidden is the width of the projection, at least 1: set projection = true, or leave it out"
            )
        return self

    def shapes(self, site: VirtualSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        d = site.n_heads * site.head_dim
        whole = 2 * site.n_layers * d
        if not self.projection:
            return {"vectors": (self.n_tokens, whole)}
        h = self.hidden or d
        return {"E": (self.n_tokens, d), **linear_shapes(1, d, h), **linear_shapes(2, h, whole)}

    def init(self, site: VirtualSite, start: Start) -> Params:
        shapes = self.shapes(site)
        if self.projection:
            return fresh_params(shapes, start.rng)
        return {"vectors": torch.empty(shapes["vectors"], dtype=torch.float32).normal_(std=0.1, generator=start.rng)}

    def vectors(self, params: Params, rng: torch.Generator | None = None) -> Tensor:
        if not self.projection:
            return params["vectors"]
        hidden = torch.tanh(torch.addmm(params["b1"], params["E"], params["W1"].T))
        return torch.addmm(params["b2"], hidden, params["W2"].T)

    def to_peft(self, sites: list[VirtualSite]) -> dict[str, Any]:
        return {**super().to_peft(sites), "prefix_projection": False}
