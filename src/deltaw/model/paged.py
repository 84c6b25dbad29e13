"""A forward of a transformers model whose attention is ours: rows of many sequences in one, keys and values in pages.

The function below is registered with transformers' AttentionInterface and chosen only while a step is computed. It
hands each layer's queries, keys and values to an object that knows where the sequences' other tokens are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from deltaw.errors import BaseError
from deltaw.model.attention import packs

NAME = "deltaw_pages"


class Attends(Protocol):
    """Attention of one layer over more than the rows at hand."""

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] of the rows -> [T, heads, D of v].

        window  a token sees itself and the window - 1 positions before it;  softcap  c * tanh(score / c)
        """


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    paged: Attends | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
    layer = getattr(module, "layer_idx", None)
    if paged is None or layer is None:
        raise BaseError(f"{type(module).__name__} does not say which layer it is, or hands nothing down to attention.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return paged.attend(layer, q, k, v, scale, sliding_window, softcap).unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def _chosen(net: PreTrainedModel) -> Iterator[None]:
    before = net.config._attn_implementation
    net.config._attn_implementation = NAME
    try:
        yield
    finally:
        net.config._attn_implementation = before


@torch.no_grad()
def paged_logits(
    net: PreTrainedModel, paged: Attends, ids: Tensor, positions: Tensor, wanted: Tensor, vectors: Tensor | None = None
) -> Tensor:
    """Logits of the rows `wanted` [n] of T rows: [n, vocab]. ids and positions [T].

    vectors  [m, width] take the place of the embeddings of the m rows whose id is negative, in order
    """
    given: dict[str, Tensor] = {"input_ids": ids[None]}
    if vectors is not None:
        embeds = net.get_input_embeddings()(ids.clamp(min=0)[None])
        embeds[0, ids < 0] = vectors.to(embeds.dtype)
        given = {"inputs_embeds": embeds}
    with _chosen(net):
        out = net(**given, position_ids=positions[None], logits_to_keep=wanted, paged=paged, use_cache=False)
    logits: Tensor = out.logits[0]
    return logits


class _Shapes:
    """Notes what each layer's keys and values look like."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, int, int]] = {}

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        self.seen[layer] = (k.shape[1], k.shape[2], v.shape[2])
        return q.new_zeros(*q.shape[:2], v.shape[2])


def cache_shapes(net: PreTrainedModel) -> list[tuple[int, int, int]]:
    """(kv_heads, key dim, value dim) of each layer, found by computing one token.

    Raises BaseError for an architecture whose attention cannot be ours, or whose layers share keys and values.
    """
    what = type(net).__name__
    if not packs(net) or getattr(net.config.get_text_config(), "num_kv_shared_layers", None):
        raise BaseError(f"{what} computes attention by itself, or shares keys between layers: it cannot be served.")
    found, one = _Shapes(), torch.zeros(1, dtype=torch.long, device=net.device)
    paged_logits(net, found, one, one, one)
    if not found.seen or sorted(found.seen) != list(range(len(found.seen))):
        raise BaseError(f"Layers {sorted(found.seen)} of {what} call attention, not each one: it cannot be served.")
    return [found.seen[layer] for layer in sorted(found.seen)]
