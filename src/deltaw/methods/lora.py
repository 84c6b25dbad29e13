"""LoRA (arXiv:2106.09685) and rsLoRA (arXiv:2312.03732).

    y = W x + s * B (A x)         A [r, in] random, B [out, r] zero: it starts exactly at the base
    s = alpha / r                 LoRA, section 4.1
    s = alpha / sqrt(r)           rsLoRA, theorem 3.2: the scale that stays stable as r grows

Other starts (methods/starts.py). PiSSA and OLoRA start B A at a part of W; the base is left alone, and that start is
subtracted instead: y = W x + s * (B A - B0 A0) x, which is a plain LoRA of rank 2r and is saved as one.

Count: r * (in + out) at a site, 2 * d * r at a square one; biases come on top where they train.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.spec import Made, Params, Start
from deltaw.core.weight import Weight
from deltaw.errors import SpecError
from deltaw.methods.lowrank import LowRank, kaiming, read_settings, with_bias
from deltaw.methods.starts import explained, lost, orthonormal, principal

OF_THE_WEIGHT = ("pissa", "olora")


class Lora(LowRank):
    """Settings of LoRA; those of `LowRank` and

    init_a   of random A: "kaiming" (uniform, a = sqrt(5)) or "gaussian" (std 1 / rank)
    start    where A and B start: "random" (A random, B zero), "pissa", "olora", "eva" (from the rows to be learned),
             or "loftq" (on a quantised base: nearer the dense one)
    """

    name: ClassVar[str] = "lora"
    lr: ClassVar[float] = 1e-3
    peft_type: ClassVar[str | None] = "LORA"
    fixed: ClassVar[tuple[str, ...]] = ("A0", "B0")

    init_a: Literal["kaiming", "gaussian"] = "kaiming"
    start: Literal["random", "pissa", "olora", "eva", "loftq"] = "random"

    @model_validator(mode="after")
    def _one_start(self) -> Lora:
        if self.start != "random" and self.init_a != "kaiming":
            raise ValueError(f"init_a is for start: random, not for start: {self.start}; remove one of them")
        return self

    @property
    def rate(self) -> float:
        return 0.2 * self.lr if self.start in ("pissa", "olora") else self.lr  # both factors move from the first step

    @property
    def calibrates(self) -> int:
        return max([self.rank, *self.rank_pattern.values()]) if self.start == "eva" else 0

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        parts = super().shapes(site, targeted)
        if targeted and self.start in OF_THE_WEIGHT:
            parts |= {"A0": parts["A"], "B0": parts["B"]}
        return parts

    def init(self, site: LinearSite, start: Start) -> Params:
        """Fresh factors; at an embedding A is zero and B normal, since A's columns are looked up."""
        if self.start == "random":
            factors = self._random(site, start.rng)
        else:
            factors = self._informed(site, start)
            if self.start in OF_THE_WEIGHT:
                factors |= {"A0": factors["A"].clone(), "B0": factors["B"].clone()}
        return with_bias(factors, start.bias)

    def _random(self, site: LinearSite, rng: torch.Generator) -> Params:
        r = self.rank_at(site)
        B = torch.zeros(site.out_features, r, dtype=torch.float32)
        if site.kind != "embedding" and self.init_a == "kaiming":
            return {"A": kaiming(r, site.in_features, rng), "B": B}
        A = torch.zeros(r, site.in_features, dtype=torch.float32)
        if site.kind == "embedding":
            B.normal_(generator=rng)
        else:
            A.normal_(std=1 / r, generator=rng)
        return {"A": A, "B": B}

    def _informed(self, site: LinearSite, start: Start) -> Params:
        r, scale = self.rank_at(site), self.scale_at(site)
        if site.kind == "embedding":
            raise SpecError(f"start: {self.start} is for linear maps; {site.name} is an embedding. Exclude it.")
        if r > min(site.in_features, site.out_features):
            raise SpecError(
                f"start: {self.start} has at most {min(site.in_features, site.out_features)} directions at "
                f"{site.name}, and rank is {r}. Lower it, there by rank_pattern."
            )
        if self.start == "eva":
            if start.directions is None:
                raise SpecError("start: eva begins from rows to be learned. Train with a recipe, or attach with rows.")
            A, B = explained(start.directions, r), torch.zeros(site.out_features, r, dtype=torch.float32)
        elif self.start == "loftq":
            A, B = lost(_source(site, start), _dense(start), r, scale)
        elif self.start == "pissa":
            A, B = principal(_dense(start), r, scale)
        else:
            A, B = orthonormal(_dense(start), r)
        return {"A": A.contiguous(), "B": B.contiguous()}

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        return super().lower(site, _joined(params), weight, bias)

    def settled(self, made: Made, sites: Mapping[str, Any]) -> Made:
        """A plain LoRA; with a start of the weight's, of twice the rank: B A - B0 A0 is `[B, -B0]` times `[A; A0]`."""
        if self.start == "random":
            return made
        if self.start not in OF_THE_WEIGHT:
            return replace(made, spec=self.model_copy(update={"start": "random"}))
        double = math.sqrt(2) if self.rslora else 2.0
        spec = self.model_copy(
            update={
                "start": "random",
                "rank": 2 * self.rank,
                "alpha": double * self.alpha,
                "rank_pattern": {key: 2 * value for key, value in self.rank_pattern.items()},
                "alpha_pattern": {key: double * value for key, value in self.alpha_pattern.items()},
            }
        )
        return Made(spec, {name: _joined(params) for name, params in made.sites.items()}, made.shared)

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


def _dense(start: Start) -> Tensor:
    assert start.weight is not None
    return start.weight.dense(torch.float32)


def _source(site: LinearSite, start: Start) -> Tensor:
    if start.source is None:
        raise SpecError(
            "start: loftq needs the weights from before quantisation. Load a dense base with format='nf4' (or another "
            "quantised format); one that stays dense, or was saved in 4 bits, has nothing to make up for."
        )
    return start.source()


def _joined(params: Params) -> Params:
    """The factors of B A - B0 A0 as one pair."""
    if "A0" not in params:
        return params
    rest = {p: t for p, t in params.items() if p not in ("A", "B", "A0", "B0")}
    A = torch.cat([params["A"], params["A0"]])
    B = torch.cat([params["B"], -params["B0"]], dim=1)
    return {"A": A, "B": B, **rest}
