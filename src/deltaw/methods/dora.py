"""DoRA (arXiv:2402.09353): a low-rank change of the direction of each row of W, and a trained length for it.

    y = g * (W x + s B (A x)) + b        g = m / |W + s B A|, the norm of each row (equation 5; rows here are the
                                         paper's columns), treated as a constant in the backward (section 4.3)
    s = alpha / r, or alpha / sqrt(r)    as in LoRA

A [r, in] random, B [out, r] zero, m [out] the norms of the start: g is 1 and it starts exactly at the base. The bias b
is not scaled (PEFT's convention). Count: r * (in + out) + out at a site; biases come on top where they train.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.spec import Params, Start
from deltaw.core.weight import Weight
from deltaw.methods.lowrank import LowRank, kaiming, read_settings, with_bias
from deltaw.ops.norm import row_norms


class Dora(LowRank):
    """Settings of DoRA: those of `LowRank`."""

    name: ClassVar[str] = "dora"
    lr: ClassVar[float] = 1e-3
    detaches: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "LORA"

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        parts = super().shapes(site, targeted)
        return {**parts, "m": (site.out_features,)} if targeted else parts

    def init(self, site: LinearSite, start: Start) -> Params:
        """A random and B zero, at an embedding A zero and B normal; m the norms of the rows as they are."""
        r = self.rank_at(site)
        A = torch.zeros(r, site.in_features, dtype=torch.float32)
        B = torch.zeros(site.out_features, r, dtype=torch.float32)
        if site.kind == "embedding":
            B.normal_(generator=start.rng)
        else:
            A = kaiming(r, site.in_features, start.rng)
        assert start.weight is not None
        m = row_norms(start.weight, A, B, self.scale_at(site)).float()
        return with_bias({"A": A, "B": B, "m": m}, start.bias)

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        plain = super().lower(site, params, weight, bias)
        if plain.A is None or plain.B is None:  # only its bias trains
            return plain
        m = params["m"]
        wide = torch.promote_types(m.dtype, torch.float32)
        norm = row_norms(weight, plain.A, plain.B, plain.scale).to(wide)
        return replace(plain, out_gain=m.to(wide) / norm)

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        return {**super().to_peft(sites), "use_dora": True}

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return super().reads_peft(config) and bool(config.get("use_dora"))

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Dora:
        dora: Dora = read_settings(cls, cls.settings_from_peft(config))
        return dora

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {**super().peft_params(), "lora_magnitude_vector": ("m", "any")}
