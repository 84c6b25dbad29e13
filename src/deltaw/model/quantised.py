"""Bases whose linear maps are kept in 4 or 8 bits: quantised while they load, or read as they were saved.

Loading goes through transformers' own quantiser interface, so that the names of every architecture, renamed or split
on load, are transformers' business. Tensors are read, quantised and dropped one at a time.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deltaw.core.site import LinearSite
from deltaw.errors import BaseError, near
from deltaw.formats import QUANTISED, BlockwiseWeight, check_block
from deltaw.model.frozen import FrozenLinear
from deltaw.model.sites import find_sites
from deltaw.model.unsupported import refuse_unquantisable

METHOD = "deltaw"


@dataclass(frozen=True)
class Format:
    """How a quantised base is kept.

    name          a key of QUANTISED
    block         values that share a scale
    double_quant  whether the scales are in 8 bits too

    Raises BaseError for a name or block that does not exist.
    """

    name: str
    block: int = 64
    double_quant: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in QUANTISED:
            raise BaseError(
                f"unknown format {self.name!r}.{near(str(self.name), QUANTISED)} Known: {', '.join(QUANTISED)}."
            )
        check_block(self.block)

    def __str__(self) -> str:
        """For fingerprints and people: "nf4", "nf4-128", "nf4+dq"."""
        block = "" if self.block == 64 else f"-{self.block}"
        return self.name + block + ("+dq" if self.double_quant else "")

    def serves(self, asked: Format) -> bool:
        """Whether weights in this format are what `asked` asks for; a setting left at its default asks for nothing."""
        block = asked.block in (64, self.block)
        return asked.name == self.name and block and self.double_quant >= asked.double_quant

    @classmethod
    def parse(cls, text: str) -> Format | None:
        """What `str` wrote; None for "dense"."""
        found = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+))?(\+dq)?", text)
        if found is None or found[1] not in QUANTISED:
            return None
        return cls(found[1], int(found[2] or 64), bool(found[3]))

    def make(self, dense: Tensor, dtype: torch.dtype) -> BlockwiseWeight:
        """`dense` [out, in] in this format, computing in `dtype`."""
        return QUANTISED[self.name].quantised(dense, dtype, self.block, self.double_quant)


def saved_format(config: dict[str, Any]) -> Format | None:
    """How the weights of a folder with this config.json are quantised; None when they are not.

    Raises BaseError for weights that another tool quantised in a way that we do not read.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    how = found.get("quant_method", "unknown") if isinstance(found, dict) else str(found)
    if how == METHOD:
        return Format(str(found.get("name")), found.get("block", 64), bool(found.get("double_quant")))
    if how == "bitsandbytes" and (found.get("load_in_4bit") or found.get("_load_in_4bit")):
        kind = found.get("bnb_4bit_quant_type", "fp4")
        return Format(kind, found.get("bnb_4bit_blocksize", 64), bool(found.get("bnb_4bit_use_double_quant")))
    kind = "bitsandbytes 8-bit" if how == "bitsandbytes" else how
    raise BaseError(
        f"its weights are quantised already, by {kind}, which deltaw does not read (it reads bitsandbytes' nf4 and fp4 "
        "and its own).\n  Give the 16- or 32-bit model that it was made from; base.format=nf4 quantises it."
    )


def quantisable(net: PreTrainedModel) -> dict[str, LinearSite]:
    """The linear maps that get quantised: all but the head, which stays in higher precision with the embeddings."""
    return {n: s for n, s in find_sites(net).items() if s.kind != "embedding" and not s.is_head}


def _all_quantisable(net: PreTrainedModel) -> dict[str, LinearSite]:
    """`quantisable`, of a network that is quantised whole. Raises BaseError where much of it would stay dense."""
    refuse_unquantisable(net)
    found = quantisable(net)
    if not found:
        raise BaseError(f"{type(net).__name__} has no linear maps to quantise.\n  Load it with format='dense'.")
    return found


def frozen_weights(net: nn.Module) -> dict[str, BlockwiseWeight]:
    """The quantised weights of a network by module path."""
    found = {n: m.frozen for n, m in net.named_modules() if isinstance(m, FrozenLinear)}
    return {n: w for n, w in found.items() if isinstance(w, BlockwiseWeight)}


@torch.no_grad()
def quantise_network(net: PreTrainedModel, how: Format) -> PreTrainedModel:
    """Quantise the linear maps of a network in memory, in place. Raises BaseError naming a map with NaN."""
    for name, site in _all_quantisable(net).items():
        module = net.get_submodule(name)
        try:
            weight = how.make(module.weight.T if site.kind == "conv1d" else module.weight, module.weight.dtype)
        except BaseError as problem:
            raise BaseError(f"{name}.weight: {problem}") from problem
        put_module(net, name, FrozenLinear(weight, module.bias, site.kind))
    return net


@torch.no_grad()
def dequantise_network(net: PreTrainedModel) -> PreTrainedModel:
    """Put plain modules with the dequantised weights in the place of quantised ones, in place."""
    for name, frozen in frozen_weights(net).items():
        old = net.get_submodule(name)
        dense = frozen.dense(frozen.dtype)
        with torch.device("meta"):
            if old.kind == "conv1d":
                plain: nn.Module = Conv1D(old.out_features, old.in_features)
            else:
                plain = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        plain.weight = nn.Parameter(dense.T.contiguous() if old.kind == "conv1d" else dense, requires_grad=False)
        plain.bias = old.bias
        put_module(net, name, plain)
    return net


def put_module(net: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`, in place."""
    parent, _, child = name.rpartition(".")
    setattr(net.get_submodule(parent), child, module)


# transformers' interface --------------------------------------------------------------------------------


@register_quantization_config(METHOD)
class _Config(QuantizationConfigMixin):
    """What a config.json says of a base that deltaw quantised; also stands in for bitsandbytes' own."""

    def __init__(self, name: str, block: int = 64, double_quant: bool = False, **_: Any) -> None:
        self.quant_method = METHOD
        self.name, self.block, self.double_quant = name, block, double_quant

    @property
    def how(self) -> Format:
        return Format(self.name, self.block, self.double_quant)


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):
    """Makes a quantised weight of each tensor as it arrives.

    made       the weights by module path, for `settle` to install
    problems   what was wrong with single tensors; transformers would hide it in a message of its own
    """

    requires_calibration = False
    serialized_names: ClassVar[dict[str, list[str]]] = {
        "weight": [
            "weight",
            "weight.nested_absmax",
            "weight.nested_quant_map",
            "weight.quant_map",
            "weight.absmax",
            *(f"weight.{kind.state_key()}" for kind in QUANTISED.values()),
        ]
    }

    def __init__(self, quantization_config: _Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.how = quantization_config.how
        self.problems: list[str] = []
        self.sites: dict[str, LinearSite] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.made: dict[str, BlockwiseWeight] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        self.sites = quantisable(model) if self.pre_quantized else _all_quantisable(model)
        self.dtypes = {n: p.dtype for n, p in model.named_parameters()}
        if self.pre_quantized:
            return
        # quantise what the file holds, not what the compute dtype would round it to
        exact = "|".join(f"^{re.escape(name)}.weight$" for name in self.sites)
        plan_of = model._get_dtype_plan
        model._get_dtype_plan = lambda dtype: {exact: torch.float32, **plan_of(dtype)}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return param_name.removesuffix(".weight") in self.sites and param_name.endswith(".weight")

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantise(self)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": _Deserialise}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    def keep(self, name: str, weight: BlockwiseWeight) -> None:
        """Keep `weight` for the map `name`, unless it does not fit. `settle` puts it in its place: until the whole
        model is loaded, transformers would overwrite its buffers."""
        site = self.sites[name]
        if (weight.out_features, weight.in_features) != (site.out_features, site.in_features):
            got, want = [weight.out_features, weight.in_features], [site.out_features, site.in_features]
            raise BaseError(f"holds a matrix of {got}, the config asks for {want}")
        if weight.name != self.how.name:
            raise BaseError(f"holds {weight.name} codes, config.json says {self.how.name}")
        self.made[name] = weight


class _Op(ConversionOps):
    def __init__(self, hf_quantizer: Quantiser) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: Any) -> _Op:
        """transformers copies an operation for each tensor; all write into one quantiser."""
        return type(self)(self.hf_quantizer)


class _Quantise(_Op):
    """Each dense tensor that arrives becomes a quantised weight; nothing is handed on to be set."""

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], missing_keys: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        for key in list(input_dict):
            value = input_dict.pop(key)
            dense = value[0] if isinstance(value, list) else value
            name, quantiser = key.removesuffix(".weight"), self.hf_quantizer
            dense = dense.T if quantiser.sites[name].kind == "conv1d" else dense
            try:
                quantiser.keep(name, quantiser.how.make(dense, quantiser.dtypes[key]))
            except BaseError as problem:
                quantiser.problems.append(f"{key}: {problem}")
            missing_keys.discard(key)
        return {}


class _Deserialise(_Op):
    """The parts of one saved matrix become a weight again; a plain tensor passes, in the model's dtype."""

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        entries = {k: v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
        quantiser, name = self.hf_quantizer, full_layer_name.removesuffix(".weight")
        dtype = quantiser.dtypes.get(full_layer_name)
        if len(entries) == 1 and name not in quantiser.sites:
            return {k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in entries.items()}
        try:
            if name not in quantiser.sites:
                raise BaseError("is quantised in the file, but is no linear map of this model")
            kinds = [f for f in QUANTISED.values() if f"weight.{f.state_key()}" in entries]
            if not kinds and len(entries) == 1:  # left dense by whoever quantised the rest
                return {k: v.to(dtype) for k, v in entries.items()}
            if len(kinds) != 1:
                raise BaseError(f"its state is missing or of an unknown kind (found {', '.join(sorted(entries))})")
            quantiser.keep(name, kinds[0].from_entries(entries, dtype))
        except BaseError as problem:
            quantiser.problems.append(f"{full_layer_name}: {problem}")
        missing_keys.discard(full_layer_name)
        return {}


def own_config(how: Format) -> dict[str, Any]:
    """`how` as a quantization_config that transformers hands to `Quantiser`."""
    return {"quant_method": METHOD, **asdict(how)}


def saved_config(how: Format, dtype: str, dense: list[str]) -> dict[str, Any]:
    """`how` as the quantization_config of a folder's config.json: bitsandbytes' own for its formats.

    dtype  in which it computes
    dense  the linear maps that were left dense
    """
    if QUANTISED[how.name].tool != "bitsandbytes":
        return own_config(how)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": how.name,
        "bnb_4bit_use_double_quant": how.double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_blocksize": how.block,
        "llm_int8_skip_modules": dense,
    }


def argument(how: Format) -> QuantizationConfigMixin:
    """`how` as the `quantization_config` of from_pretrained."""
    return _Config(**asdict(how))


def settle(net: PreTrainedModel, folder: Any) -> PreTrainedModel:
    """Put the quantised weights in place and take transformers' marks off: ours is an ordinary frozen network.

    Raises BaseError listing what was wrong with single tensors.
    """
    problems = net.hf_quantizer.problems
    if not problems and not net.hf_quantizer.made:
        problems = ["none of its tensors is quantised, whatever its config.json says"]
    if problems:
        more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
        listed = "\n  ".join(problems[:5])
        raise BaseError(f"the weights of {folder} cannot be kept in {net.hf_quantizer.how.name}:\n  {listed}{more}")
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = tensor.data.clone()  # one that is a view of the mapped file would keep all that was read of it
    for name, weight in net.hf_quantizer.made.items():
        put_module(net, name, FrozenLinear(weight, net.get_submodule(name).bias, net.hf_quantizer.sites[name].kind))
    net.hf_quantizer.remove_quantization_config(net)
    net.__dict__.pop("_get_dtype_plan", None)
    return net
