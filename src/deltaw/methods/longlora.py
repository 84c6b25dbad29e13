"""LongLoRA (arXiv:2309.12307): LoRA for longer documents, at the training cost of short ones.

    y = W x + s * B (A x)        as LoRA, and embeddings and norms train whole (section 3.3)

In training, attention is shifted and sparse (S2-Attn, section 3.2): each document is cut into groups, half of the heads
attend within [0, g), [g, 2g) ..., the other half within groups moved by g / 2, so that neighbours exchange. No group
reaches into another document or around its end. Otherwise, in evaluation, generation and the merged model, attention
is the base's own. Positions are rescaled to the new length (arXiv:2306.15595; YaRN: arXiv:2309.00071).

Count: as LoRA, and every number of the embeddings and norms.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator

from deltaw.core.site import LinearSite
from deltaw.core.spec import Groups, Params, Start
from deltaw.errors import SpecError
from deltaw.methods.lowrank import LowRank, kaiming, with_bias


class LongLora(LowRank):
    """Settings of LongLoRA; those of `LowRank` and

    max_positions  tokens that the adapted model can read; None: as many as the base
    rope           how positions are rescaled to them: "linear" (all divided by the ratio) or "yarn"
    group_share    tokens of a group, as a share of the document; 1: plain attention
    group_least    no group is shorter; documents up to this length are attended to as a whole
    """

    name: ClassVar[str] = "longlora"
    lr: ClassVar[float] = 1e-3
    starts_at_base: ClassVar[bool] = False
    batchable: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "LORA"

    save_modules: tuple[str, ...] = ("embed_tokens", "norm")
    max_positions: int | None = None
    rope: Literal["linear", "yarn"] = "linear"
    group_share: float = 0.25
    group_least: int = 256

    @field_validator("group_share")
    @classmethod
    def _share_is_a_share(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError("must be above 0 and at most 1")
        return value

    @field_validator("group_least")
    @classmethod
    def _least_is_a_group(cls, value: int) -> int:
        if value < 2:
            raise ValueError("must be at least 2")
        return value

    def init(self, site: LinearSite, start: Start) -> Params:
        r = self.rank_at(site)
        A = kaiming(r, site.in_features, start.rng)
        B = torch.zeros(site.out_features, r, dtype=torch.float32)
        if site.kind == "embedding":
            A, B = torch.zeros_like(A), B.normal_(generator=start.rng)
        return with_bias({"A": A, "B": B}, start.bias)

    def overrides(self, config: Any) -> dict[str, Any]:
        """More positions, rescaled; {} when `max_positions` is None. Raises SpecError where they are not rotary."""
        if self.max_positions is None:
            return {}
        known, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
        if not isinstance(known, int) or not isinstance(rope, dict) or "rope_theta" not in rope:
            raise SpecError(
                f"max_positions rescales rotary positions, and {getattr(config, 'model_type', 'this base')} has none "
                "of one kind. Remove it, or take another base."
            )
        if rope.get("rope_type", "default") != "default":
            raise SpecError(f"This base's positions are rescaled already ({rope['rope_type']}). Remove max_positions.")
        if self.max_positions <= known:
            raise SpecError(f"max_positions is {self.max_positions}, and the base reads {known} as it is. Give more.")
        rescaled = {**rope, "rope_type": self.rope, "factor": self.max_positions / known}
        if self.rope == "yarn":
            rescaled["original_max_position_embeddings"] = known
        return {"max_position_embeddings": self.max_positions, "rope_parameters": rescaled}

    def groups(self, length: int) -> Groups | None:
        """Shifted groups of a document of `length` tokens; None: it is attended to as a whole."""
        size = max(math.ceil(length * self.group_share), self.group_least)
        return Groups(size, size // 2) if size < length else None

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        return False  # PEFT has no such thing: a foreign file of this kind is a plain LoRA

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> LongLora:
        raise NotImplementedError
