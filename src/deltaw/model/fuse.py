"""Packs through fused blocks: a transformers model's blocks read as `ops.block` has them, where they are of that kind.

Everything else takes the model's own code, and `why_plain` says why. Nothing of the model is changed: what its modules
hold is read anew for every forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.core.affine import Affine
from deltaw.core.weight import Weight
from deltaw.data.needed import needed
from deltaw.data.pack import Batch
from deltaw.model.host import EmbeddingHost, Host
from deltaw.model.swap import Swapped
from deltaw.ops.arena import Arena
from deltaw.ops.block import AttentionHalf, Block, FeedForward, Norm, Pack
from deltaw.ops.block import fused as fused  # where a planner listens
from deltaw.ops.byrows import by_rows
from deltaw.ops.maps import Map

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3")
"""Whose `...ForCausalLM` and `...DecoderLayer` have the two halves of `ops.block`, and no others."""

_ACTS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}


class Plain(Exception):
    """This forward takes the model's own code; the message says why."""


def fused_hidden(
    net: PreTrainedModel, weights: Mapping[str, Weight], batch: Batch, arena: Arena, *, training: bool, again: bool
) -> Tensor:
    """What the head reads at a pack's targets: [n_targets, d], behind the last norm.

    weights   of the linear maps by name, for those that wear nothing
    training  whether dropout is drawn
    again     compute the blocks again in the backward

    Raises Plain before anything is computed.
    """
    blocks = read_blocks(net, weights, training=training)
    longest = int(batch.bounds.diff().max())
    if net.device.type != "cuda":  # whose attention knows no fronts
        batch = needed(batch)
    body: Any = net.model
    x = body.embed_tokens(batch.input_ids)
    wide = torch.promote_types(x.dtype, torch.float32)
    places = torch.arange(longest, device=x.device)[None]  # of whole documents: a scaling of positions may look at them
    cos, sin = (t[0][batch.positions] for t in body.rotary_emb(x.new_empty(0, dtype=wide), position_ids=places))
    pack = Pack(batch.bounds, cos, sin, batch.fronts)
    for i, block in enumerate(blocks):
        rows = batch.predict_at if i == len(blocks) - 1 else None
        x = fused(block, x, pack, arena, rows=rows, again=again, spend=i > 0)
    changed = isinstance(body.norm, Swapped) and body.norm.is_used()
    hidden: Tensor = body.norm(x) if changed else by_rows(body.norm, x)
    return hidden


def wears(head: nn.Module) -> bool:
    """Whether an adapter in use changes a head, so that its own forward must compute."""
    return (isinstance(head, Swapped) and head.is_used()) or (
        isinstance(head, Host) and (bool(head.in_use()) or head.base_is_swapped())
    )


def why_plain(net: PreTrainedModel, weights: Mapping[str, Weight], *, training: bool) -> str | None:
    """Why packs of `net` are computed by its own code now, in a few words; None where blocks are fused."""
    try:
        read_blocks(net, weights, training=training)
    except Plain as reason:
        return str(reason)
    return None


def read_blocks(net: PreTrainedModel, weights: Mapping[str, Weight], *, training: bool) -> list[Block]:
    """The blocks with what they wear now; with dropout, if `training`. Raises Plain."""
    family = type(net).__name__.removesuffix("ForCausalLM")
    body: Any = getattr(net, "model", None)
    if family not in FAMILIES or type(net).__name__ == family or not len(getattr(body, "layers", ())):
        raise Plain(f"{type(net).__name__} is not one of {', '.join(FAMILIES)}")
    if any(p.requires_grad for p in net.parameters()):
        raise Plain("the base itself trains")
    if any(m._forward_hooks or m._forward_pre_hooks for m in body.modules()):
        raise Plain("a module has hooks")
    reader = _Reader(weights, training)
    return [reader.block(layer, f"model.layers.{i}") for i, layer in enumerate(body.layers)]


class _Reader:
    """Reads one model's blocks."""

    def __init__(self, weights: Mapping[str, Weight], training: bool) -> None:
        self._weights = weights
        self._training = training

    def block(self, layer: Any, name: str) -> Block:
        if type(layer).__name__.removesuffix("DecoderLayer") not in FAMILIES or "forward" in vars(layer):
            raise Plain(f"{name} is a {type(layer).__name__}")
        attention, mlp = layer.self_attn, layer.mlp
        return Block(
            self._attention(attention, self._norm(layer.input_layernorm), f"{name}.self_attn"),
            FeedForward(
                self._norm(layer.post_attention_layernorm),
                self._maps(mlp, ("gate_up_proj",), ("gate_proj", "up_proj"), f"{name}.mlp"),
                self._map(mlp.down_proj, f"{name}.mlp.down_proj"),
                self._act(getattr(mlp, "act_fn", None) or mlp.activation_fn),
            ),
        )

    def _attention(self, module: Any, norm: Norm, name: str) -> AttentionHalf:
        config = module.config
        heads = [self._norm(n) if (n := getattr(module, f"{x}_norm", None)) is not None else None for x in "qk"]
        has_own = hasattr(module, "sliding_window")  # per layer; else the config's, for all
        return AttentionHalf(
            norm=norm,
            inputs=self._maps(module, ("qkv_proj",), ("q_proj", "k_proj", "v_proj"), name),
            output=self._map(module.o_proj, f"{name}.o_proj"),
            heads=config.num_attention_heads,
            shared=config.num_key_value_heads,
            dim=module.head_dim,
            scale=module.scaling,
            window=module.sliding_window if has_own else getattr(config, "sliding_window", None),
            q_norm=heads[0],
            k_norm=heads[1],
        )

    def _maps(self, module: Any, whole: tuple[str, ...], parts: tuple[str, ...], name: str) -> tuple[Map, ...]:
        keys = whole if hasattr(module, whole[0]) else parts
        return tuple(self._map(getattr(module, key), f"{name}.{key}") for key in keys)

    def _map(self, module: nn.Module, name: str) -> Map:
        if not isinstance(module, Host):
            if isinstance(module, Swapped) and module.is_used():
                raise Plain(f"{name} is replaced whole")
            return Map(self._weights[name], getattr(module, "bias", None), None)
        if isinstance(module, EmbeddingHost) or module.base_is_swapped():
            raise Plain(f"{name} is replaced whole")
        used = module.in_use()
        if not used:
            return Map(module.frozen, module.bias, None)
        (slot, weight), *others = used
        if others or weight != 1.0:
            raise Plain("adapters are summed or weighted")
        if slot.rows is not None or slot.heard is not None or not slot.params:
            raise Plain(f"{slot.spec.name} does more at {name} than change its matrix")
        form = module.form(slot)
        if not isinstance(form, Affine):
            raise Plain(f"{slot.spec.name} adds a network beside the block's maps")
        if form.drop > 0 and self._training:
            raise Plain("dropout is above 0")
        return Map(module.frozen, module.bias, form)

    def _norm(self, module: Any) -> Norm:
        original: Any = module.original if isinstance(module, Swapped) else module
        if not type(original).__name__.endswith("RMSNorm") or getattr(original, "bias", None) is not None:
            raise Plain(f"a norm is a {type(original).__name__}")
        weight = original.weight
        if isinstance(module, Swapped) and module.is_used():
            weight = module.seen()["weight"]
        eps = getattr(original, "variance_epsilon", None)
        return Norm(weight, original.eps if eps is None else eps, one_plus=type(original).__name__ == "GemmaRMSNorm")

    def _act(self, module: nn.Module) -> str:
        if type(module).__name__ not in _ACTS:
            raise Plain(f"the activation is {type(module).__name__}")
        return _ACTS[type(module).__name__]
