"""VeRA (arXiv:2310.11454): one frozen random pair of factors for the whole model, and two vectors at each map.

    y = W x + b * (B0 (d * (A0 x)))       A0 [r, widest in], B0 [widest out, r] random, shared and never trained
                                          d [r] and b [out] train; b starts at zero: it starts exactly at the base

Equation 2 of the paper. A map reads the first `in` columns of A0 and the first `out` rows of B0.
Count: r + out at a site; A0 and B0 are not trained, and need not be saved.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.spec import Count, Factor, Made, MethodSpec, Params, Seed, Share, Start
from deltaw.core.weight import Weight
from deltaw.errors import AdapterError
from deltaw.methods.lowrank import peft_places, read_settings


class Vera(MethodSpec):
    """Settings of VeRA.

    rank             of the shared factors; large, since they cost nothing to train
    d_initial        what d starts at (section 3.2 of the paper); not 0: with b zero too nothing could learn
    dropout          on the input of A0, in training only
    projection_seed  A0 and B0 are a function of it and of the widest maps
    save_projection  whether A0 and B0 are in the file, or made again from the seed (as PEFT's does)
    """

    name: ClassVar[str] = "vera"
    peft_type: ClassVar[str | None] = "VERA"
    fixed: ClassVar[tuple[str, ...]] = ("A0", "B0")
    lr: ClassVar[float] = 3e-2

    rank: Count = 256
    d_initial: Factor = 0.1
    dropout: Share = 0.0
    projection_seed: Seed = 0
    save_projection: bool = True

    @property
    def shared_is_saved(self) -> bool:
        return self.save_projection

    def shared_shapes(self, sites: Sequence[LinearSite]) -> dict[str, tuple[int, ...]]:
        widest_in, widest_out = max(s.in_features for s in sites), max(s.out_features for s in sites)
        return {"A0": (self.rank, widest_in), "B0": (widest_out, self.rank)}

    def init_shared(self, sites: Sequence[LinearSite], rng: torch.Generator) -> Params:
        """Kaiming-uniform from the seed alone: the numbers that PEFT draws."""
        own = torch.Generator().manual_seed(self.projection_seed)
        made = {}
        for name, (rows, columns) in self.shared_shapes(sites).items():
            bound = math.sqrt(6 / columns)
            made[name] = torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=own)
        return made

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        return {"d": (self.rank,), "b": (site.out_features,)}

    def init(self, site: LinearSite, start: Start) -> Params:
        return {
            "d": torch.full((self.rank,), self.d_initial, dtype=torch.float32),
            "b": torch.zeros(site.out_features, dtype=torch.float32),
        }

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        A0, B0 = params["A0"][:, : weight.in_features], params["B0"][: weight.out_features]
        return Affine(A=params["d"][:, None] * A0, B=params["b"][:, None] * B0, drop=self.dropout)

    def settled(self, made: Made, sites: Mapping[str, LinearSite]) -> Made:
        return made if self.save_projection else replace(made, shared={})

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "d_initial": self.d_initial,
            "vera_dropout": self.dropout,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "bias": "none",
            "fan_in_fan_out": any(s.kind == "conv1d" for s in sites),
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Vera:
        if config.get("bias", "none") != "none":
            raise AdapterError(f"adapter_config.json asks for bias={config['bias']!r}, which method 'vera' cannot say.")
        settings = {
            "rank": config.get("r", 256),
            "d_initial": config.get("d_initial", 0.1),
            "dropout": config.get("vera_dropout", 0.0),
            "projection_seed": config.get("projection_prng_key") or 0,
            "save_projection": config.get("save_projection", True),
        }
        vera: Vera = read_settings(cls, settings | peft_places(config))
        return vera

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {
            "vera_lambda_d": ("d", "linear"),
            "vera_lambda_b": ("b", "linear"),
            "base_model.vera_A": ("A0", "shared"),
            "base_model.vera_B": ("B0", "shared"),
        }
