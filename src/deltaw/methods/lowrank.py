"""What LoRA and its relatives share: factors A and B of a low rank, their scale, and where biases train.

A method base: `Lora`, `Dora` and `LongLora` derive from it.
"""

from __future__ import annotations

import math
import re
from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite, Site
from deltaw.core.spec import MOST, Count, Factor, MethodSpec, Params, Share, finite_not_zero
from deltaw.core.weight import Weight
from deltaw.errors import AdapterError, SpecError

_REFUSED_PEFT = (
    "lora_bias", "target_parameters", "layer_replication", "alora_invocation_tokens",
    "use_qalora", "use_bdlora", "megatron_config", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")


class LowRank(MethodSpec):
    """Settings of methods with factors A [rank, in] and B [out, rank].

    rank, alpha, rslora          alpha / rank is the scale (alpha / sqrt(rank) with `rslora`)
    dropout                      on the input of A, in training only
    rank_pattern, alpha_pattern  {name or expression: value} for single modules; matched as PEFT does,
                                 at the end of the path, the first match wins
    bias                         "none"; "lora_only": biases of targeted maps train; "all": every bias of a
                                 linear map and of a norm
    """

    schedule: ClassVar[Literal["cosine", "hold"]] = "hold"  # learns more at one rate, and forgets no more

    rank: Count = 16
    alpha: Factor = 32.0
    rslora: bool = False
    dropout: Share = 0.0
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    bias: Literal["none", "all", "lora_only"] = "none"

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _keys_are_expressions(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"{key!r} is no name and no regular expression: {error}") from None
        return value

    @field_validator("rank_pattern")
    @classmethod
    def _ranks_are_positive(cls, value: dict[str, int]) -> dict[str, int]:
        if not all(1 <= r <= MOST for r in value.values()):
            raise ValueError(f"holds a rank that is not from 1 to {MOST:,}")
        return value

    @field_validator("alpha_pattern")
    @classmethod
    def _alphas_are_numbers(cls, value: dict[str, float]) -> dict[str, float]:
        for alpha in value.values():
            finite_not_zero(alpha)
        return value

    def rank_at(self, site: LinearSite) -> int:
        """The rank at one site."""
        return int(_first_match(self.rank_pattern, site.name, self.rank))

    def scale_at(self, site: LinearSite) -> float:
        """The one scaling function: alpha / r, or alpha / sqrt(r) for rsLoRA, of this site's alpha and r."""
        r = self.rank_at(site)
        alpha = float(_first_match(self.alpha_pattern, site.name, self.alpha))
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    def idle(self, sites: list[LinearSite]) -> list[str]:
        keys = {k: "rank_pattern" for k in self.rank_pattern} | {k: "alpha_pattern" for k in self.alpha_pattern}
        hit = {_first_key(p, s.name) for p in (self.rank_pattern, self.alpha_pattern) for s in sites}
        return [f"{setting} {key!r}" for key, setting in keys.items() if key not in hit]

    @property
    def trains_biases(self) -> bool:
        return self.bias != "none"

    @property
    def trains_norm_biases(self) -> bool:
        return self.bias == "all"

    def wants(self, site: Site) -> bool:
        return self.bias == "all" and isinstance(site, LinearSite) and site.has_bias

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        r = self.rank_at(site)
        parts: dict[str, tuple[int, ...]] = {}
        if targeted:
            parts = {"A": (r, site.in_features), "B": (site.out_features, r)}
        if site.has_bias and self.bias != "none":
            parts["bias"] = (site.out_features,)
        return parts

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        return Affine(
            A=params.get("A"),
            B=params.get("B"),
            scale=self.scale_at(site),
            bias=params.get("bias"),
            drop=self.dropout,
        )

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        return {
            "r": self.rank,
            "lora_alpha": int(self.alpha) if self.alpha == int(self.alpha) else self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "init_lora_weights": True,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": self.bias,
            "fan_in_fan_out": any(s.kind == "conv1d" for s in sites),
            "use_dora": False,
            "lora_bias": False,
        }

    @classmethod
    def settings_from_peft(cls, config: dict[str, Any]) -> dict[str, Any]:
        """The shared settings from PEFT's adapter_config.json; raises AdapterError for what we cannot represent."""
        refused = [key for key in _REFUSED_PEFT if config.get(key)]
        if refused:
            raise AdapterError(
                f"adapter_config.json asks for {', '.join(refused)}, which method {cls.name!r} does not have."
            )
        init = config.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise AdapterError(
                f"adapter_config.json says init_lora_weights={init!r}: such an adapter belongs to a base that was "
                "changed at initialisation. Convert it in PEFT (path_initial_model_for_weight_conversion) first."
            )
        return {
            "rank": config.get("r", 8),
            "alpha": config.get("lora_alpha", 8),
            "dropout": config.get("lora_dropout", 0.0),
            "rslora": bool(config.get("use_rslora", False)),
            "rank_pattern": config.get("rank_pattern") or {},
            "alpha_pattern": config.get("alpha_pattern") or {},
            "bias": config.get("bias", "none"),
            **peft_places(config),
        }

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {
            "lora_A.weight": ("A", "linear"),
            "lora_B.weight": ("B", "linear"),
            "lora_embedding_A": ("A", "embedding"),
            "lora_embedding_B": ("B", "embedding"),
        }


def read_settings(cls: type[MethodSpec], settings: dict[str, Any]) -> Any:
    """A method from settings that a foreign file brought. Raises AdapterError."""
    try:
        return cls(**settings)
    except SpecError as error:
        raise AdapterError(f"adapter_config.json: {error}") from None


def peft_places(config: dict[str, Any]) -> dict[str, Any]:
    """The shared settings (targets, exclude, layers, save_modules) from PEFT's adapter_config.json."""
    layers = config.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]

    def listed(key: str) -> Any:
        value = config.get(key)
        return tuple(sorted(value)) if isinstance(value, list | tuple | set) else value

    return {
        "targets": listed("target_modules") or (),
        "exclude": listed("exclude_modules") or None,
        "layers": tuple(layers) if layers else None,
        "save_modules": listed("modules_to_save") or (),
    }


def kaiming(rank: int, n_in: int, rng: torch.Generator) -> Tensor:
    """A fresh factor [rank, n_in]: kaiming_uniform_ with a = sqrt(5), which is uniform within 1 / sqrt(n_in)."""
    bound = 1 / math.sqrt(n_in)
    return torch.empty(rank, n_in, dtype=torch.float32).uniform_(-bound, bound, generator=rng)


def with_bias(params: Params, bias: Tensor | None) -> Params:
    """`params` and a copy of the base's bias, where there is one."""
    return params if bias is None else {**params, "bias": bias.detach().float().clone()}


def _first_match(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first key that matches."""
    key = _first_key(pattern, path)
    return default if key is None else pattern[key]


def _first_key(pattern: dict[str, Any], path: str) -> str | None:
    """PEFT's rule: the first key that matches the whole path or a dotted tail of it."""
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", path)), None) if pattern else None
