"""Bottleneck adapters: Houlsby's (arXiv:1902.00751), Pfeiffer's (arXiv:2005.00247), parallel ones (arXiv:2110.04366).

    y = h + s * (up act(down h + down_bias) + up_bias)       serial: h [d] is the output of a block's half
    y = h + s * (up act(down u + down_bias) + up_bias)       parallel: u [d] is the half's input

Figure 2 of the first paper, section 3 of the second, table 1 of the third. up and its bias start at zero: a fresh
adapter changes nothing. No weight of the base can hold it. Count: 2 m d + m + d at a half, m the bottleneck.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from deltaw.core.bottleneck import Bottleneck
from deltaw.core.site import BlockSite, Site
from deltaw.core.spec import Count, Factor, MethodSpec, Params, Start
from deltaw.core.weight import Weight
from deltaw.errors import AdapterError
from deltaw.methods.lowrank import peft_places, read_settings

_STD = 1e-2  # of a fresh `down`: section 3.6 of the first paper


class Houlsby(MethodSpec):
    """Settings of bottleneck adapters.

    bottleneck  features of the small network's middle
    act         "relu", "gelu", "silu" or "tanh"
    scale       on what the small network adds
    placement   "houlsby": behind attention and behind the feed-forward; "pfeiffer": behind the feed-forward;
                "parallel": beside the feed-forward
    """

    name: ClassVar[str] = "houlsby"
    sits: ClassVar[Literal["linear", "block", "input", "cache"]] = "block"
    peft_type: ClassVar[str | None] = "BOTTLENECK"  # the LLM-Adapters fork's name
    mergeable: ClassVar[bool] = False
    in_peft: ClassVar[bool] = False
    lr: ClassVar[float] = 5e-4

    bottleneck: Count = 64
    act: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    scale: Factor = 1.0
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"

    @property
    def rate(self) -> float:
        return 3e-3 if self.placement == "parallel" else self.lr

    def sits_at(self, site: Site) -> bool:
        return isinstance(site, BlockSite) and (site.part == "ffn" or self.placement == "houlsby")

    def shapes(self, site: BlockSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        m, d = self.bottleneck, site.width
        return {"down": (m, d), "down_bias": (m,), "up": (d, m), "up_bias": (d,)}

    def init(self, site: BlockSite, start: Start) -> Params:
        made = {part: torch.zeros(shape, dtype=torch.float32) for part, shape in self.shapes(site).items()}
        made["down"].normal_(std=_STD, generator=start.rng)
        return made

    def lower(self, site: BlockSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Bottleneck:
        return Bottleneck(
            down=params["down"],
            up=params["up"],
            down_bias=params["down_bias"],
            up_bias=params["up_bias"],
            act=self.act,
            scale=self.scale,
            parallel=self.placement == "parallel",
        )

    def to_peft(self, sites: list[BlockSite]) -> dict[str, Any]:
        layers = self.layer_numbers()
        return {
            "bottleneck_size": self.bottleneck,
            "non_linearity": self.act,
            "scaling": self.scale,
            "use_parallel_adapter": self.placement == "parallel",
            "use_adapterp": self.placement == "pfeiffer",
            "layers_to_transform": None if layers is None else sorted(layers),
            "exclude_modules": list(self.exclude) if isinstance(self.exclude, tuple) else self.exclude,
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Houlsby:
        if config.get("target_modules"):
            raise AdapterError(
                "adapter_config.json names target_modules: it is the LLM-Adapters fork's own, whose adapters have no "
                "biases and stand in front of some maps. Such files cannot be read."
            )
        placed = {(False, True): "pfeiffer", (True, False): "parallel", (False, False): "houlsby"}
        flags = bool(config.get("use_parallel_adapter")), bool(config.get("use_adapterp"))
        if flags not in placed:
            raise AdapterError("adapter_config.json sets use_parallel_adapter and use_adapterp: only one can hold.")
        places = peft_places(config)
        del places["targets"]
        own = {
            "bottleneck": config.get("bottleneck_size", 256),
            "act": config.get("non_linearity", "tanh"),
            "scale": config.get("scaling", 1.0),
            "placement": placed[flags],
        }
        houlsby: Houlsby = read_settings(cls, places | own)
        return houlsby

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {
            "adapter_down.weight": ("down", "block"),
            "adapter_down.bias": ("down_bias", "block"),
            "adapter_up.weight": ("up", "block"),
            "adapter_up.bias": ("up_bias", "block"),
        }

    @classmethod
    def peft_site(cls, name: str, params: Params) -> BlockSite | None:
        width = params["down"].shape[-1] if "down" in params else 0
        return BlockSite(name, "", width, "attention" if "att" in name.lower() else "ffn")
