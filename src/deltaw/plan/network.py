"""The network that is planned, without memory for its weights: a base's folder, a hub config or a shape by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from deltaw.core.checkpoint_files import checkpoint_files, read_header, read_json
from deltaw.core.spec import MethodSpec
from deltaw.data.pack import collate
from deltaw.data.template import Example
from deltaw.errors import BaseError, near
from deltaw.formats import QUANTISED
from deltaw.model.empty import config_from_hub, network_from
from deltaw.model.frozen import FrozenLinear
from deltaw.model.kinds import mark_fresh
from deltaw.model.load import local_path, resolve_base
from deltaw.model.model import Model
from deltaw.model.quantised import quantisable
from deltaw.model.starter import STARTERS, Say
from deltaw.ops.rounds import watched
from deltaw.plan.trace import Tracer

SHAPES = Path(__file__).resolve().parent / "shapes"
ALIASES = {
    "7b": "llama-7b",
    "13b": "llama-13b",
    "65b": "llama-65b",
    "70b": "llama-70b",
    "smollm2-135m-instruct": "smollm2-135m",
}


@dataclass(frozen=True)
class Base:
    """A base as it would be kept.

    config                       what config.json says
    folder                       where its weights are, or None: a shape only
    format, block, double_quant  how its linear maps are kept
    dtype                        in which it computes
    labels                       of a text classifier; None: as its head has them
    """

    name: str
    config: dict[str, Any]
    folder: Path | None
    format: str = "dense"
    block: int = 64
    double_quant: bool = False
    dtype: str = "float32"
    labels: tuple[str, ...] | None = None


def shapes() -> dict[str, dict[str, Any]]:
    """The shapes that are shipped, by name: what matters of each config.json."""
    return {name: json.loads(text) for name, text in _texts()}


@cache
def _texts() -> tuple[tuple[str, str], ...]:
    """Name and config.json of every shape, as text: who is given a config may change it."""
    return tuple((f.stem, f.read_text(encoding="ascii")) for f in sorted(SHAPES.glob("*.json")))


def find_config(name: str | Path, say: Say | None = None) -> tuple[dict[str, Any], Path | None]:
    """(config.json, folder or None) of a folder, a .gguf file, a shape's name (or 7B, 13B, 65B, 70B) or a hub id.

    Of a hub id only config.json is fetched. Raises BaseError for what is none of them.
    """
    text = str(name)
    path = local_path(text)
    if (text.strip() and path.is_dir()) or path.suffix.lower() == ".gguf":
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
    if not path.is_file():
        raise BaseError(f"{path} is not there.\n  A base has a config.json.")
    return read_json(path)


def _names_in(folder: Path | None) -> set[str] | None:
    """The names of the tensors in a folder; None where there are no weights."""
    try:
        return None if folder is None else {name for file in checkpoint_files(folder) for name in read_header(file)}
    except BaseError:
        return None


@torch.no_grad()
def network_of(base: Base) -> PreTrainedModel:
    """The network on the meta device as it would be kept."""
    net: PreTrainedModel = network_from(base.config, getattr(torch, base.dtype), base.labels)
    mark_fresh(net, base.config, _names_in(base.folder))
    quantised = quantisable(net) if base.format in QUANTISED else {}
    for name, site in quantised.items():
        module = net.get_submodule(name)
        parent, _, child = name.rpartition(".")
        weight = QUANTISED[base.format].empty(
            site.out_features,
            site.in_features,
            dtype=module.weight.dtype,
            block=base.block,
            double_quant=base.double_quant,
        )
        setattr(net.get_submodule(parent), child, FrozenLinear(weight, module.bias, site.kind))
    return net


def planned_model(base: Base, spec: MethodSpec) -> Model:
    """The model that would train, on the meta device, with a fresh adapter.

    Raises what attaching the real one raises: TargetError, AdapterError, BaseError.
    """
    return with_adapter(planned_base(base), base, spec)


def planned_base(base: Base) -> Model:
    """The model without an adapter, on the meta device."""
    return Model(network_of(base))


def with_adapter(model: Model, base: Base, spec: MethodSpec) -> Model:
    """`model`, which `planned_base` made, with a fresh adapter. Raises as `planned_model`."""
    sites = model.places.sites
    if base.format in QUANTISED:
        model.originals = lambda name: torch.empty(
            sites[name].out_features, sites[name].in_features, device="meta", dtype=torch.float32
        )
    rows = [collate([Example((0,) * 4, (False, False, False, True), "planned")])] if spec.calibrates else []
    tracer = Tracer()
    with watched(tracer), tracer, torch.device("meta"):
        model.attach(spec, calibration=rows)
    return model
