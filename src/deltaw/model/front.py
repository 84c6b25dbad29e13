"""What encoders and decoders are given where an adapter's learned vectors stand in front of their sequences.

As PEFT has it: vectors among the token embeddings stand in front of what the encoder reads; keys and values stand in
front of an encoder's own in each layer, and in an encoder-decoder in front of the decoder's (not of those that it reads
from the encoder). There PEFT 0.21 gives layer i of L the keys and values numbered 2 i mod L in the file, since it cuts
what it doubled for attention to the encoder and then drops. Its files mean that, so ours do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

from deltaw.core.prefix import Prefix
from deltaw.errors import AdapterError
from deltaw.model.virtual import FrontLayer, by_layer, inputs_of


def encoder_arguments(
    net: PreTrainedModel, front: Prefix | None, input_ids: Tensor, mask: Tensor | None
) -> dict[str, Any]:
    """Padded rows [batch, tokens] behind the vectors that stand among the token embeddings, if there are any."""
    if front is None or front.inputs is None:
        return {"input_ids": input_ids, "attention_mask": mask}
    rows = len(input_ids)
    embeds = net.get_input_embeddings()(input_ids)
    embeds = torch.cat([inputs_of(front).to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    return {"inputs_embeds": embeds, "attention_mask": _grown(mask, rows, front.n)}


def front_arguments(
    net: PreTrainedModel, front: Prefix | None, input_ids: Tensor, mask: Tensor | None
) -> dict[str, Any]:
    """What a classifier is given: padded rows [batch, tokens] behind `front`, of either kind."""
    if front is None or front.inputs is not None:
        return encoder_arguments(net, front, input_ids, mask)
    rows = len(input_ids)
    layers = [FrontLayer(k, v, i) for i, (k, v) in enumerate(by_layer(front, rows))]
    grown = _grown(mask, rows, front.n)
    return {"input_ids": input_ids, "attention_mask": grown, "past_key_values": Cache(layers=layers)}


def decoder_cache(net: PreTrainedModel, front: Prefix | None, rows: int, *, grows: bool) -> Any:
    """The cache of a decoder with `front` in it; None where nothing is to be kept.

    grows  whether answers are made token by token; if not, it stays as it is, so that blocks can be computed again
    """
    config = net.config.get_text_config(decoder=True)
    if grows:
        own, cross = DynamicCache(config=config), DynamicCache(config=config)
        if front is not None and front.inputs is None:
            for number, (keys, values) in enumerate(_as_cut(front, rows)):
                own.update(keys, values, number)
        return EncoderDecoderCache(own, cross)
    if front is None or front.inputs is not None:
        return None
    layers = [FrontLayer(k, v, i) for i, (k, v) in enumerate(_as_cut(front, rows))]
    empty = [FrontLayer(k[:, :, :0], v[:, :, :0], i) for i, (k, v) in enumerate(_as_cut(front, rows))]
    cache = EncoderDecoderCache(Cache(layers=layers), Cache(layers=empty))
    cache.is_updated = _Never()
    return cache


def _as_cut(front: Prefix, rows: int) -> list[tuple[Tensor, Tensor]]:
    """What each layer of a decoder gets of the saved keys and values."""
    saved = by_layer(front, rows)
    return [saved[2 * i % len(saved)] for i in range(len(saved))]


def refuse_unread(net: PreTrainedModel, cache: Any) -> None:
    """Raise AdapterError where `net` computed without looking at the keys and values in front of a layer's own."""
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    if cache is not None and (unread := [i for i, layer in enumerate(own.layers) if not layer.was_read]):
        raise AdapterError(
            f"{type(net).__name__} does not read keys and values in front of its layer {unread[0]}: prefix tuning "
            "cannot work with it. Use method 'prompt'."
        )


class _Never(dict[int, bool]):
    """Says of every layer that nothing is kept of what it read from the encoder."""

    def __setitem__(self, key: int, value: bool) -> None:
        """Nothing is kept."""


def _grown(mask: Tensor | None, rows: int, n: int) -> Tensor | None:
    return None if mask is None else torch.cat([mask.new_ones(rows, n), mask], 1)
