"""IA3 (arXiv:2205.05638): vectors that scale keys, values and what goes into the last feed-forward map.

    y = l * (W x + b)       at keys and values, l [out]
    y = W (l * x) + b       at the last map of a feed-forward, l [in]

Section 3.3 of the paper, where keys and values have no bias; PEFT scales the bias too, and so do we. l starts at one: a
fresh adapter changes nothing. Count: out at a key or value map, in at a feed-forward map.
"""

from __future__ import annotations

import re
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

AUTO = "auto"
_KEYS_AND_VALUES = re.compile(
    r"(k|v|key|value)(_proj|_lin)?"  # a map of their own
    r"|kv_(proj|b_proj)|qkv(_proj)?|c_attn|query_key_value|Wqkv|W_pack|in_proj"  # together, or with the queries
)
_LAST = re.compile(r"(.*\.)?(down_proj|dense_4h_to_h|fc2|fc_out|wo|w2|lin2|mlp\.c_proj|output\.dense|ffn_output)")


class Ia3(MethodSpec):
    """Settings of IA3.

    targets      "auto": keys, values and the last map of each feed-forward, found by their names (a fused map of
                 queries, keys and values as a whole); or names, an expression or "all-linear", as everywhere
    feedforward  the targets whose input is scaled, not their output: "auto" (the last maps of feed-forwards), names, or
                 an expression
    """

    name: ClassVar[str] = "ia3"
    peft_type: ClassVar[str | None] = "IA3"
    lr: ClassVar[float] = 3e-2

    targets: str | tuple[str, ...] = AUTO
    feedforward: str | tuple[str, ...] = AUTO

    def choose(self, sites: list[LinearSite]) -> list[LinearSite] | None:
        if self.targets != AUTO:
            return None
        found = [s for s in sites if _is_key_or_value(s) or _is_last(s)]
        return found if {_is_last(s) for s in found} == {True, False} else []

    def scales_input(self, site: LinearSite) -> bool:
        """Whether l scales what goes into the map, not what comes out."""
        return _is_last(site) if self.feedforward == AUTO else matches(self.feedforward, site.name)

    def idle(self, sites: list[LinearSite]) -> list[str]:
        names = (self.feedforward,) if isinstance(self.feedforward, str) else self.feedforward
        rules = [n if isinstance(self.feedforward, str) else (n,) for n in names if n != AUTO]
        return [f"feedforward {r!r}" for r in rules if not any(matches(r, s.name) for s in sites)]

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        if site.kind == "embedding":
            raise TargetError(f"Method 'ia3' scales linear maps, and {site.name} is an embedding: do not target it.")
        return {"l": (1, site.in_features) if self.scales_input(site) else (site.out_features, 1)}

    def init(self, site: LinearSite, start: Start) -> Params:
        return {"l": torch.ones(self.shapes(site)["l"], dtype=torch.float32)}

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        gain = params["l"].flatten()
        if self.scales_input(site):
            return Affine(in_gain=gain)
        return Affine(out_gain=gain, bias=None if bias is None else gain * bias)

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        """Names as they were given where PEFT reads them so: `feedforward` among `targets`; else whole paths."""
        config: dict[str, Any] = {"init_ia3_weights": True}
        if not sites:
            return config
        config["fan_in_fan_out"] = any(s.kind == "conv1d" for s in sites)
        whole = self.exclude is not None or self.layers is not None
        given = [t for t in (self.targets, self.feedforward) if not isinstance(t, str)]
        if len(given) == 2 and not whole and set(given[1]) <= set(given[0]):
            return config | {"feedforward_modules": sorted(given[1])}
        names = sorted(s.name for s in sites)
        scaled = sorted(s.name for s in sites if self.scales_input(s))
        return config | {"target_modules": names, "feedforward_modules": scaled}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Ia3:
        last = config.get("feedforward_modules") or ()
        if not isinstance(last, str) and any(t != n and t.endswith(n) for n in last for t in _listed(config)):
            last = f".*({'|'.join(map(re.escape, sorted(last)))})"  # PEFT has "o" mean "wo" too
        last = last if isinstance(last, str) else tuple(sorted(last))
        ia3: Ia3 = read_settings(cls, {**peft_places(config), "feedforward": last})
        return ia3

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        return {"ia3_l": ("l", "linear")}

    @classmethod
    def peft_site(cls, name: str, params: Params) -> LinearSite | None:
        n_out, n_in = params["l"].shape if "l" in params and params["l"].ndim == 2 else (0, 0)
        return LinearSite(name, n_in, n_out)


def _listed(config: dict[str, Any]) -> list[str]:
    """The names of PEFT's targets; none where they are an expression."""
    targets = config.get("target_modules") or ()
    return [] if isinstance(targets, str) else list(targets)


def _inside(site: LinearSite) -> str:
    """The path inside the block; "" outside of blocks."""
    found = re.match(r".*\.\d+\.(.+)$", site.name)
    return found.group(1) if found and site.kind != "embedding" else ""


def _is_key_or_value(site: LinearSite) -> bool:
    return "att" in _inside(site).lower() and _KEYS_AND_VALUES.fullmatch(site.role) is not None


def _is_last(site: LinearSite) -> bool:
    inside = _inside(site)
    return "att" not in inside.lower() and _LAST.fullmatch(inside) is not None
