"""A recipe's `train.optimizer`."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

LORA_PLUS_RATIO = 16.0
RATES = {"lora_plus": 1.5e-4, "galore": 1e-3}
"""Learning rates of a recipe that does not say, where the optimizer and not the method decides."""

_OF_GALORE = ("rank", "update_every", "scale", "targets")


class OptimizerSpec(BaseModel):
    """AdamW's settings, and those of what is built on it.

    name              adamw; lora_plus: AdamW with lora_plus_ratio 16; galore: AdamW on projected gradients, for `full`
    weight_decay      decoupled, as AdamW's
    betas             decay of the two moments
    eps               added to the root of the second moment
    lora_plus_ratio   B's learning rate over A's (LoRA+, arXiv:2402.12354; 16 there)
    rank              of GaLore's projections (arXiv:2403.03507)
    update_every      updates after which GaLore projects anew
    scale             of GaLore's projected updates
    targets           what GaLore projects: "all-linear" (weights of linear maps but the head), names or dotted
                      suffixes, or a regular expression for the whole path; embeddings and head can be named
    paged             keep states in a file, in pages; the result is the same bit for bit
    resident_mb       of states and buffers in memory when paged (10^6 bytes); None: a quarter of the states
    bits              of the states; 8: by blocks of 256 values (arXiv:2110.02861)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["adamw", "lora_plus", "galore"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    lora_plus_ratio: float = 1.0
    rank: int = 128
    update_every: int = 200
    scale: float = 0.25
    targets: str | tuple[str, ...] = "all-linear"
    paged: bool = False
    resident_mb: float | None = None
    bits: Literal[32, 8] = 32

    @model_validator(mode="after")
    def _budget_is_for_pages(self) -> OptimizerSpec:
        mb = self.resident_mb
        if mb is not None and not self.paged:
            raise ValueError(f"resident_mb is {mb:g}, and states are not paged; add paged: true, or remove it")
        if mb is not None and not (math.isfinite(mb) and mb > 0):
            raise ValueError(f"resident_mb must be a finite number above 0, not {mb}")
        return self

    @model_validator(mode="after")
    def _settings_belong_to_the_name(self) -> OptimizerSpec:
        if self.name == "lora_plus" and "lora_plus_ratio" not in self.model_fields_set:
            object.__setattr__(self, "lora_plus_ratio", LORA_PLUS_RATIO)
        if self.name == "galore" and self.lora_plus_ratio != 1:
            raise ValueError(
                f"lora_plus_ratio is {self.lora_plus_ratio:g}, and galore trains the base's own weights, "
                "which have no A and B; remove it"
            )
        fields = type(self).model_fields
        if self.name != "galore" and (given := [k for k in _OF_GALORE if getattr(self, k) != fields[k].default]):
            raise ValueError(f"{', '.join(given)} belongs to galore; write name: galore, or remove it")
        return self

    @model_validator(mode="after")
    def _projection_makes_sense(self) -> OptimizerSpec:
        for key in ("rank", "update_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, not {getattr(self, key)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"scale must be a finite number above 0, not {self.scale}")
        if not self.targets:
            raise ValueError("targets names nothing; write all-linear, names, or a regular expression")
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ValueError(f"targets is no regular expression: {error}") from None
        return self
