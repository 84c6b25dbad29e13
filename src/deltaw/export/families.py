"""Architectures that llama.cpp computes as transformers does: names, layout and settings of their tensors.

Names are those of the gguf package (TensorNameMap), llama.cpp's own. Two things differ in layout. For Llama's family
rotary positions turn neighbours (2i, 2i + 1) of a head in llama.cpp, and halves (i, i + d/2) in transformers, so rows
of q and k change places. And Gemma's norms multiply by 1 + w: llama.cpp keeps the sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from deltaw.errors import BaseError, near

Setting = tuple[str, Any]
"""A method of gguf.GGUFWriter without its "add_", and what it takes."""


@dataclass(frozen=True)
class Family:
    """One architecture.

    arch         `general.architecture`
    interleaved  rows of q and k are written in llama.cpp's order
    norm_offset  what is added to the weights of norms
    biases       tensors that may have a bias there; others would be left out by llama.cpp
    activation   settings in config.json that must have one of these values
    """

    arch: str
    interleaved: bool = False
    norm_offset: float = 0.0
    biases: tuple[str, ...] = ()
    activation: tuple[str, tuple[str, ...]] = ("hidden_act", ("silu",))


_LLAMA_BIASES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_TANH = ("gelu_new", "gelu_pytorch_tanh")

FAMILIES = {
    "llama": Family("llama", interleaved=True, biases=_LLAMA_BIASES),
    "mistral": Family("llama", interleaved=True, biases=_LLAMA_BIASES),
    "qwen2": Family("qwen2", biases=("attn_q", "attn_k", "attn_v")),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", norm_offset=1.0, activation=("hidden_act", _TANH)),
    "gpt2": Family(
        "gpt2",
        biases=("attn_qkv", "attn_output", "ffn_up", "ffn_down", "attn_norm", "ffn_norm", "output_norm"),
        activation=("activation_function", _TANH),
    ),
}
"""By `model_type` of config.json."""


@dataclass(frozen=True)
class Layout:
    """How one base lies in a GGUF file. `config`: its settings as transformers names them, defaults filled in."""

    family: Family
    config: dict[str, Any]
    names: Any

    def name_of(self, tensor: str) -> str | None:
        """llama.cpp's name for a tensor of the network ("blk.0.attn_q.weight"), or None where it has none."""
        found: str | None = self.names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            return None
        stem, _, part = found.rpartition(".")
        short = stem.split(".", 2)[2] if stem.startswith("blk.") else stem
        return None if part == "bias" and short not in self.family.biases else found

    def lora_name_of(self, tensor: str) -> str | None:
        """The same for a matrix that llama.cpp adds a LoRA to; it would load one for positions, and never add it."""
        found = self.name_of(tensor)
        return (
            found if found and (found.startswith("blk.") or found in ("token_embd.weight", "output.weight")) else None
        )

    def rows(self, name: str, value: Tensor) -> Tensor:
        """`value` [out, ...] of the tensor called `name` there, with rows in llama.cpp's order."""
        heads = {"attn_q": self.heads, "attn_k": self.kv_heads}.get(name.split(".")[2] if name[:4] == "blk." else "")
        if heads is None or not self.family.interleaved:
            return value
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return halves.transpose(1, 2).reshape(value.shape)

    def lay_out(self, name: str, value: Tensor) -> Tensor:
        """`value` of the tensor called `name` there, in [out, in] order, as llama.cpp wants it."""
        if self.family.norm_offset and name.endswith("norm.weight"):
            return value + self.family.norm_offset
        return self.rows(name, value)

    @property
    def heads(self) -> int:
        """Query heads."""
        return int(self.config.get("num_attention_heads") or self.config["n_head"])

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        width = self.config.get("hidden_size") or self.config["n_embd"]
        return int(self.config.get("head_dim") or width // self.heads)


def layout_of(config: dict[str, Any]) -> Layout:
    """The layout of a base whose settings are `config`. Raises BaseError for a family that is not known here."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise BaseError(
            f"deltaw writes no GGUF for architecture {model_type!r}.{near(model_type, FAMILIES)}\n"
            f"  Known: {', '.join(FAMILIES)}. For others, deltaw merge and then llama.cpp's own convert_hf_to_gguf.py."
        )
    family = FAMILIES[model_type]
    blocks = int(config.get("num_hidden_layers") or config["n_layer"])
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    return Layout(family, config, gguf.get_tensor_name_map(arch, blocks))


def config_problems(layout: Layout) -> list[str]:
    """What the base's settings ask for that llama.cpp would not compute, a sentence each."""
    config, found = layout.config, []
    key, known = layout.family.activation
    if config.get(key) not in known:
        found.append(f"its {key} is {config.get(key)!r}; llama.cpp computes {known[0]} there")
    if config["model_type"] != "mistral" and "sliding_attention" in (config.get("layer_types") or ()):
        found.append("some of its layers attend to a window only")
    if config["model_type"] == "gpt2":
        if not config.get("scale_attn_weights", True) or config.get("scale_attn_by_inverse_layer_idx"):
            found.append("its attention is scaled in another way than 1 / sqrt(head size)")
        return found
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        found.append(f"its positions are rescaled by {kind!r}")
    if kind == "yarn" and any(rope.get(k) is not None for k in ("attention_factor", "mscale", "mscale_all_dim")):
        found.append("its YaRN sets attention_factor or mscale by hand")
    if kind == "yarn" and rope.get("truncate") is False:
        found.append("its YaRN does not round its range (truncate: false)")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        found.append("its positions turn a part of each head only")
    return found


def settings_of(layout: Layout) -> list[Setting]:
    """The settings of the architecture for a GGUF file, in order."""
    config = layout.config
    if layout.family.arch == "gpt2":
        width = config["n_embd"]
        return [
            ("block_count", config["n_layer"]),
            ("context_length", config["n_positions"]),
            ("embedding_length", width),
            ("feed_forward_length", config.get("n_inner") or 4 * width),
            ("head_count", config["n_head"]),
            ("layer_norm_eps", config["layer_norm_epsilon"]),
        ]
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    positions = config["max_position_embeddings"]
    found: list[Setting] = [
        ("block_count", config["num_hidden_layers"]),
        ("context_length", min(positions, window or positions)),  # up to its window, attention is the same without one
        ("embedding_length", config["hidden_size"]),
        ("feed_forward_length", config["intermediate_size"]),
        ("head_count", layout.heads),
        ("head_count_kv", layout.kv_heads),
        ("key_length", layout.head_dim),
        ("value_length", layout.head_dim),
        ("rope_dimension_count", layout.head_dim),
        ("layer_norm_rms_eps", config["rms_norm_eps"]),
    ]
    rope = _rope(config)
    found.append(("rope_freq_base", float(rope.get("rope_theta", 10000.0))))
    if rope.get("rope_type") == "linear":
        found += [("rope_scaling_type", gguf.RopeScalingType.LINEAR), ("rope_scaling_factor", float(rope["factor"]))]
    if rope.get("rope_type") == "yarn":
        known = rope.get("original_max_position_embeddings") or positions
        found += [("rope_scaling_type", gguf.RopeScalingType.YARN), ("rope_scaling_factor", float(rope["factor"]))]
        found.append(("rope_scaling_orig_ctx_len", int(known)))
        found.append(("rope_scaling_yarn_beta_fast", float(rope.get("beta_fast") or 32.0)))
        found.append(("rope_scaling_yarn_beta_slow", float(rope.get("beta_slow") or 1.0)))
    return found


def rope_factors(layout: Layout) -> Tensor | None:
    """What Llama 3.1 divides each rotary frequency by: [head_dim / 2], `rope_freqs.weight`; None: nothing.

    Wavelengths below old / high_freq_factor stay, those above old / low_freq_factor are divided by the factor, and
    between them the frequency is blended (transformers' rope_type "llama3").
    """
    rope = _rope(layout.config)
    if rope.get("rope_type") != "llama3":
        return None
    low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    powers = torch.arange(0, layout.head_dim, 2, dtype=torch.float64) / layout.head_dim
    wavelengths = 2 * math.pi * float(rope.get("rope_theta", 10000.0)) ** powers
    blend = ((old / wavelengths - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - blend) / rope["factor"] + blend)
    return factors.float()


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config.get("rope_parameters") or {}
    return found
