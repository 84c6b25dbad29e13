"""What methods that learn vectors in front of the sequence share: how many, how they are saved, PEFT's names.

A method base: `Prompt`, `PTuning` and `PrefixTuning` derive from it. The vectors alone are saved: an encoder that makes
them is needed in training only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deltaw.core.prefix import Prefix
from deltaw.core.site import VirtualSite
from deltaw.core.spec import Count, Made, MethodSpec, Params
from deltaw.core.weight import Weight
from deltaw.methods.lowrank import read_settings


class Virtual(MethodSpec):
    """Settings of methods that put learned vectors in front of the sequence.

    n_tokens  how many positions they take
    """

    n_tokens: Count = 20

    starts_at_base: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    peft_prefix: ClassVar[str] = "base_model."  # PEFT wraps the model once, not twice
    plain: ClassVar[dict[str, Any]] = {}  # the settings of an adapter whose vectors stand for themselves

    def vectors(self, params: Params, rng: torch.Generator | None = None) -> Tensor:
        """The vectors as they are saved, differentiable in `params`; `rng` draws dropout in a training step."""
        return params["vectors"]

    def lower(self, site: VirtualSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Prefix:
        return _formed(self.vectors(params), site, self.n_tokens)

    def lower_in_step(self, site: VirtualSite, params: Params, rng: torch.Generator) -> Prefix:
        return _formed(self.vectors(params, rng), site, self.n_tokens)

    def settled(self, made: Made, sites: Mapping[str, Any]) -> Made:
        """The vectors alone, and settings that ask for no encoder."""
        spec = self.model_copy(update=type(self).plain)
        return Made(spec, {name: {"vectors": self.vectors(params)} for name, params in made.sites.items()}, {})

    def to_peft(self, sites: list[VirtualSite]) -> dict[str, Any]:
        about: dict[str, Any] = {"num_virtual_tokens": self.n_tokens}
        for site in sites:  # one at most; PEFT fills in what is null from the base's config
            own = site.kind == "cache" and site.n_layers > 0
            about |= {
                "token_dim": site.n_heads * site.head_dim if own else site.width or None,
                "num_transformer_submodules": site.stacks,
                "num_attention_heads": site.n_heads if own else None,
                "num_layers": site.n_layers if own else None,
            }
        return about

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Virtual:
        return cls.with_settings(config, cls.plain)

    @classmethod
    def with_settings(cls, config: dict[str, Any], own: dict[str, Any]) -> Virtual:
        """Settings from PEFT's adapter_config.json and the method's `own`. Raises AdapterError."""
        saved = tuple(sorted(config.get("modules_to_save") or ()))
        made: Virtual = read_settings(cls, {"n_tokens": config.get("num_virtual_tokens"), "save_modules": saved, **own})
        return made

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {"prompt_embeddings": ("vectors", "virtual")}

    @classmethod
    def peft_site(cls, name: str, params: Params) -> VirtualSite | None:
        if "vectors" not in params:
            return None
        kind = "cache" if cls.sits == "cache" else "input"
        return VirtualSite(name, kind, params["vectors"].shape[-1] if kind == "input" else 0)  # type: ignore[arg-type]


def _formed(vectors: Tensor, site: VirtualSite, n: int) -> Prefix:
    """Saved vectors as the normal form.

    At the input they are [stacks * n, width]. In the cache [n, layers * 2 * heads * head_dim], where a layer's keys
    come before its values, as PEFT has them.
    """
    if site.kind == "input":
        return Prefix(inputs=vectors.view(site.stacks, n, site.width))
    by_layer = vectors.view(n, site.n_layers, 2, site.n_heads, site.head_dim).transpose(0, 1)
    return Prefix(keys=by_layer[:, :, 0], values=by_layer[:, :, 1])


def linear_shapes(number: int, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    """The shapes of layer `number` of an encoder: weight W [out, in] and bias b [out]."""
    return {f"W{number}": (n_out, n_in), f"b{number}": (n_out,)}


def fresh_params(shapes: dict[str, tuple[int, ...]], rng: torch.Generator, hidden: int = 0) -> Params:
    """Fresh parameters of an encoder, as torch's own layers make them.

    E [n, d] is normal; W and b of a linear map are uniform within 1 / sqrt(in); an LSTM's within 1 / sqrt(hidden)
    """
    made: Params = {}
    for name, shape in shapes.items():
        value = torch.empty(shape, dtype=torch.float32)
        if name == "E":
            made[name] = value.normal_(generator=rng)
            continue
        n_in = shapes["W" + name[1:]][1] if name[0] in "Wb" and name[1:].isdigit() else hidden
        made[name] = value.uniform_(-1 / math.sqrt(n_in), 1 / math.sqrt(n_in), generator=rng)
    return made
