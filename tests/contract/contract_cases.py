"""For each registered method, settings that cannot hide a bug. A method without a row here fails the suite."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from deltaw.core.spec import MethodSpec
from deltaw.methods import METHODS, method_class
from deltaw.model.model import Model

CASES: dict[str, list[dict[str, Any]]] = {
    "lora": [
        {"rank": 3, "alpha": 5},
        {"rank": 3, "alpha": 5, "start": "pissa"},
        {"rank": 3, "alpha": 5, "start": "olora"},
        {"rank": 3, "alpha": 5, "rslora": True, "bias": "all", "rank_pattern": {"q_proj": 2, "c_attn": 2}},
    ],
    "dora": [
        {"rank": 3, "alpha": 5},
        {"rank": 3, "alpha": 5, "rslora": True, "bias": "all", "rank_pattern": {"q_proj": 2, "c_attn": 2}},
    ],
    "longlora": [{"rank": 3, "alpha": 5, "max_positions": 128, "group_least": 4, "needs_rope": True}],
    "vera": [{"rank": 7}, {"rank": 5, "save_projection": False, "projection_seed": 3}],
    "ia3": [{}, {"targets": "all-linear"}],
    "bitfit": [{"needs_bias": True}, {"add": True}],
    "houlsby": [
        {"bottleneck": 5},
        {"bottleneck": 7, "act": "gelu", "scale": 0.7, "placement": "pfeiffer"},
        {"bottleneck": 3, "act": "tanh", "scale": 1.5, "placement": "parallel"},
    ],
    "prompt": [{"n_tokens": 5}, {"n_tokens": 4, "start": "random"}],
    "prefix": [{"n_tokens": 5, "projection": False}, {"n_tokens": 4, "projection": True, "hidden": 7}],
    "ptuning": [{"n_tokens": 5, "hidden": 9}, {"n_tokens": 4, "encoder": "lstm", "hidden": 3, "depth": 3}],
}
NEEDS = ("needs_bias", "needs_rope")  # not settings: on which networks the case makes sense
TRAINS_BASE = {"full"}  # no adapter: nothing to save, merge or detach


@dataclass(frozen=True)
class Case:
    """One method with settings, on one architecture; `changes` are set in the architecture's config."""

    method: str
    settings: dict[str, Any]
    kind: str
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = "-".join(f"{k}={v}" for k, v in self.settings.items() if not isinstance(v, dict))
        return f"{self.method}-{shown}-{self.kind}{'-plain' if self.changes else ''}"

    @property
    def spec(self) -> MethodSpec:
        settings = dict(self.settings)
        if self.kind == "gpt2" and "rank_pattern" in settings:
            settings["rank_pattern"] = {"c_attn": 2}
        elif "rank_pattern" in settings:
            settings["rank_pattern"] = {"q_proj": 2}
        return method_class(self.method)(**settings)


WITHOUT_BIAS = {"attention_bias": False, "mlp_bias": False}
NETS = [("llama", {}), ("llama", WITHOUT_BIAS), ("gpt2", {})]


def cases() -> list[Case]:
    """Every case on three networks: with biases, without, and with GPT-2's transposed maps."""
    found = []
    for method in METHODS:
        for settings in CASES.get(method.name, []):
            wanted = {k: v for k, v in settings.items() if k not in NEEDS}
            for kind, changes in NETS:
                if (changes and settings.get("needs_bias")) or (kind == "gpt2" and settings.get("needs_rope")):
                    continue
                found.append(Case(method.name, wanted, kind, changes))
    return found


def randomise(model: Model, seed: int = 1, size: float = 0.3) -> None:
    """Noise on every tensor of the attached adapter, gains and biases included."""
    rng = torch.Generator().manual_seed(seed)
    made = model.adapters[next(iter(model.run.use))]
    with torch.no_grad():
        for name, value in made.tensors().items():
            if name.startswith("shared:") and not made.spec.shared_is_saved:
                continue  # a function of the settings
            value += size * torch.randn(value.shape, generator=rng).to(value.dtype)
