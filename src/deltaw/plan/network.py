"""The network that is planned, without memory for its weights: a base's folder, a hub config or a shape by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec
from deltaw.errors import BaseError, near
from deltaw.formats import QUANTISED
from deltaw.model.empty import config_from_hub, network_from
from deltaw.model.frozen import FrozenLinear
from deltaw.model.load import resolve_base
from deltaw.model.model import Model
from deltaw.model.quantised import quantisable
from deltaw.model.starter import STARTERS, Say

SHAPES = Path(__file__).resolve().parent / "shapes"
ALIASES = {
    "7b": "llama-7b",
    "13b": "llama-13b",
    "65b": "llama-65b",
    "70b": "llama-70b",
    "smollm2-135m-instruct": "smollm2-135m",
}
SCRATCH_BYTES = 8 << 20
"""Most of a quantised matrix that a product holds dequantised at a time."""


@dataclass(frozen=True)
class Base:
    """A base as it would be kept.

    config                       what config.json says
    folder                       where its weights are, or None: a shape only
    format, block, double_quant  how its linear maps are kept
    dtype                        in which it computes
    """

    name: str
    config: dict[str, Any]
    folder: Path | None
    format: str = "dense"
    block: int = 64
    double_quant: bool = False
    dtype: str = "float32"


def shapes() -> dict[str, dict[str, Any]]:
    """The shapes that are shipped, by name: what matters of each config.json."""
    return {f.stem: json.loads(f.read_text(encoding="ascii")) for f in sorted(SHAPES.glob("*.json"))}


def find_config(name: str | Path, say: Say | None = None) -> tuple[dict[str, Any], Path | None]:
    """(config.json, folder or None) of a folder, a .gguf file, a shape's name (or 7B, 13B, 65B, 70B) or a hub id.

    Of a hub id only config.json is fetched. Raises BaseError for what is none of them.
    """
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir() or path.suffix.lower() == ".gguf":
        folder = resolve_base(path, say=say)
        return _read(folder / "config.json"), folder
    known = shapes()
    key = ALIASES.get(text.lower(), text.lower())
    if key in known:
        from deltaw.core.fingerprint import cache_dir

        cached = cache_dir() / "bases" / text
        return known[key], cached if text in STARTERS and cached.is_dir() else None
    if "/" in text and not path.exists():
        return _read(config_from_hub(text)), None
    raise BaseError(
        f"no base and no shape is called {text!r}.{near(text.lower(), [*known, *ALIASES])}\n"
        f"  Give a folder, a hub id (owner/name) or a shape: 7B, 13B, 65B, 70B, {', '.join(known)}."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise BaseError(f"{path} cannot be read as JSON: {problem}.\n  A base has a config.json.") from None
    if not isinstance(found, dict):
        raise BaseError(f"{path} is no JSON object.\n  Download the model again.")
    return found


class PlannedWeight(nn.Module):
    """Stands for a matrix in a quantised format: takes the memory that its products take, and computes nothing."""

    def __init__(self, site: LinearSite, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = site.in_features, site.out_features, dtype

    def mul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias: [..., in] -> [..., out]."""
        y: Tensor = _Mul.apply(x, bias, self)
        return y

    def mul_t(self, g: Tensor) -> Tensor:
        """g W: [..., out] -> [..., in]."""
        scratch = self._scratch(g)
        y = g.new_empty(*g.shape[:-1], self.in_features)
        del scratch
        return y

    def columns(self, ids: Tensor) -> Tensor:
        """Columns of W: [..., out]."""
        return torch.empty(*ids.shape, self.out_features, dtype=self.dtype, device=ids.device)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W as [out, in]: a method that looks at the weight takes this memory for a moment."""
        return torch.empty(self.out_features, self.in_features, dtype=dtype, device="meta")

    def like(self, dense: Tensor) -> PlannedWeight:
        """This weight: a plan changes no values."""
        return self

    def nbytes(self) -> int:
        """None of its own; `bytes_of` counts what the format takes."""
        return 0

    def _scratch(self, x: Tensor) -> Tensor:
        whole = self.in_features * self.out_features
        return x.new_empty(min(whole, SCRATCH_BYTES // x.element_size()))


class _Mul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: PlannedWeight) -> Tensor:
        ctx.weight, ctx.has_bias = weight, bias is not None and bias.requires_grad
        scratch = weight._scratch(x)
        y = x.new_empty(*x.shape[:-1], weight.out_features)
        del scratch
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        dx = ctx.weight.mul_t(g) if ctx.needs_input_grad[0] else None
        return dx, g.reshape(-1, g.shape[-1]).sum(0) if ctx.has_bias else None, None


@torch.no_grad()
def network_of(base: Base) -> tuple[nn.Module, dict[str, LinearSite]]:
    """The network on the meta device as it would be kept, and the maps that its format quantises."""
    net = network_from(base.config, getattr(torch, base.dtype))
    quantised = quantisable(net) if base.format in QUANTISED else {}
    for name, site in quantised.items():
        module = net.get_submodule(name)
        parent, _, child = name.rpartition(".")
        weight = PlannedWeight(site, module.weight.dtype)
        setattr(net.get_submodule(parent), child, FrozenLinear(weight, module.bias, site.kind))
    return net, quantised


def planned_model(base: Base, spec: MethodSpec) -> tuple[Model, dict[str, LinearSite]]:
    """The model that would train, on the meta device, with a fresh adapter; and the maps that are quantised.

    Raises what attaching the real one raises: TargetError, AdapterError, BaseError.
    """
    from deltaw.plan.trace import Tracer

    net, quantised = network_of(base)
    model = Model(net)  # type: ignore[arg-type]
    with Tracer(), torch.device("meta"):
        model.attach(spec)
    return model, quantised
