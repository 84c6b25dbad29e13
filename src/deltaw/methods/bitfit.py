"""BitFit (arXiv:2106.10199): only biases train, those of linear maps and of norms.

    y = W x + b'         b' [out] starts at the base's bias: a fresh adapter changes nothing

Section 3 of the paper. Biases of norms are replaced whole. Count: out at a linear map, and every bias of a norm.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec, Params, Start
from deltaw.core.targets import matches
from deltaw.core.weight import Weight
from deltaw.errors import TargetError
from deltaw.methods.lowrank import peft_places, read_settings


class BitFit(MethodSpec):
    """Settings of BitFit.

    add    whether targeted maps without a bias get one, zero at the start; else they stay as they are
    norms  whether biases of norms train too, in every block
    """

    name: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str | None] = "BITFIT"  # a name of ours
    in_peft: ClassVar[bool] = False
    lr: ClassVar[float] = 3e-3

    add: bool = False
    norms: bool = True

    @property
    def trains_biases(self) -> bool:
        return True

    @property
    def trains_norm_biases(self) -> bool:
        return self.norms

    def idle(self, sites: list[LinearSite]) -> list[str]:
        """Nothing; TargetError where the targets, or a name among them, have no bias to train."""
        advice = "Set add: true to give maps biases that start at zero, or choose another method."
        if not sites:
            raise TargetError(
                f"Method 'bitfit' trains biases, and no map of targets={self.targets!r} has one. {advice}"
            )
        names = () if isinstance(self.targets, str) else self.targets
        if bare := [name for name in names if not any(matches((name,), s.name) for s in sites)]:
            raise TargetError(f"Method 'bitfit' finds no bias at {', '.join(bare)}: remove it from targets. {advice}")
        return []

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        has_one = site.has_bias or (self.add and site.kind != "embedding")
        return {"bias": (site.out_features,)} if has_one else {}

    def init(self, site: LinearSite, start: Start) -> Params:
        if start.bias is None:
            return {"bias": torch.zeros(site.out_features, dtype=torch.float32)}
        return {"bias": start.bias.detach().float().clone()}

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        return Affine(bias=params["bias"])

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        return {"add_biases": self.add, "norm_biases": self.norms}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> BitFit:
        own = {"add": config.get("add_biases", False), "norms": config.get("norm_biases", True)}
        bitfit: BitFit = read_settings(cls, {**peft_places(config), **own})
        return bitfit

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {}  # a bias is called what it is called in the base
