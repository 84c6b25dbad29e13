"""LoRA (arXiv:2106.09685) and rsLoRA (arXiv:2312.03732).

    y = W x + s * B (A x)         A [r, in] random, B [out, r] zero: it starts exactly at the base
    s = alpha / r                 LoRA, section 4.1
    s = alpha / sqrt(r)           rsLoRA, theorem 3.2: the scale that stays stable as r grows

Count: r * (in + out) at a site, 2 * d * r at a square one; biases come on top where they train.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from deltaw.core.site import LinearSite
from deltaw.core.spec import Params, Start
from deltaw.methods.lowrank import LowRank, kaiming, read_settings, with_bias


class Lora(LowRank):
    """Settings of LoRA; those of `LowRank` and

    init_a   "kaiming" (uniform, a = sqrt(5)) or "gaussian" (std 1 / rank)
    """

    name: ClassVar[str] = "lora"
    peft_type: ClassVar[str | None] = "LORA"

    init_a: Literal["kaiming", "gaussian"] = "kaiming"

    def init(self, site: LinearSite, start: Start) -> Params:
        """A random and B zero; at an embedding A zero and B normal, since A's columns are looked up."""
        r = self.rank_at(site)
        A = torch.zeros(r, site.in_features)
        B = torch.zeros(site.out_features, r)
        if site.kind == "embedding":
            B.normal_(generator=start.rng)
        elif self.init_a == "kaiming":
            A = kaiming(r, site.in_features, start.rng)
        else:
            A.normal_(std=1 / r, generator=start.rng)
        return with_bias({"A": A, "B": B}, start.bias)

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        init = "gaussian" if self.init_a == "gaussian" else True
        return {**super().to_peft(sites), "init_lora_weights": init}

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return super().reads_peft(config) and not config.get("use_dora")

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Lora:
        init = "gaussian" if config.get("init_lora_weights") == "gaussian" else "kaiming"
        lora: Lora = read_settings(cls, {**cls.settings_from_peft(config), "init_a": init})
        return lora
