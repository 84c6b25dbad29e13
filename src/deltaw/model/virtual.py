"""Computing with learned vectors in front of the sequence, among the token embeddings or in each layer's cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deltaw.core.prefix import Prefix
from deltaw.core.site import VirtualSite
from deltaw.data.pack import Batch
from deltaw.errors import AdapterError
from deltaw.model.attachment import Attachment
from deltaw.model.attention import Documents, packs, refuse_other_shape, spread
from deltaw.model.places import Places

_NOT_READ = (
    "{} does not read plain keys and values in front of its layer {}: prefix tuning cannot work with it. "
    "Use method 'prompt'."
)


def front_of(
    used: Iterable[Attachment], places: Places, net: PreTrainedModel, seed: int | None = None
) -> Prefix | None:
    """The vectors in front of the sequence that one of the adapters in use has, in the base's dtype; else None.

    seed  of a training step: dropout where vectors are made is drawn from it

    Raises AdapterError for an architecture that cannot compute with them.
    """
    for made in used:
        for name, site in made.places.items():
            if isinstance(site, VirtualSite):
                _refuse(made, site, net)
                form = None
                if seed is not None:
                    form = made.spec.lower_in_step(site, made.at(name), torch.Generator().manual_seed(seed))
                form = made.lowered(name, places) if form is None else form
                assert isinstance(form, Prefix)
                return form.to(net.dtype)
    return None


def _refuse(made: Attachment, site: VirtualSite, net: PreTrainedModel) -> None:
    config: Any = net.config.get_text_config()
    if site.kind == "cache" and getattr(config, "num_kv_shared_layers", None):
        raise AdapterError(
            f"Method {made.spec.name!r} needs keys and values in every layer, and layers of this model share theirs. "
            "Use method 'prompt'."
        )


# Padded rows ---------------------------------------------------------------------------------------


def padded_logits(net: PreTrainedModel, front: Prefix | None, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of padded rows [batch, tokens], each behind `front`: [batch, tokens, vocab]."""
    rows, tokens = input_ids.shape
    if mask is not None and front is not None:
        mask = torch.cat([mask.new_ones(rows, front.n), mask], 1)
    logits: Tensor
    if front is None:
        logits = net(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    elif front.inputs is not None:
        embeds = net.get_input_embeddings()(input_ids)
        embeds = torch.cat([inputs_of(front).to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
        logits = net(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -tokens:]
    else:
        layers = [FrontLayer(k, v, i) for i, (k, v) in enumerate(by_layer(front, rows))]
        cache = Cache(layers=layers)
        logits = net(input_ids=input_ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        if unread := [i for i, layer in enumerate(layers) if not layer.was_read]:
            raise AdapterError(_NOT_READ.format(type(net).__name__, unread[0]))
    return logits


def one_by_one(net: PreTrainedModel, front: Prefix | None, batch: Batch) -> Tensor:
    """The logits of a pack's targets, for an architecture whose documents cannot share a row."""
    parts = []
    for start, end in itertools.pairwise(batch.bounds.tolist()):
        at = batch.predict_at[(batch.predict_at >= start) & (batch.predict_at < end)] - start
        if len(at):
            parts.append(padded_logits(net, front, batch.input_ids[None, start:end])[0, at])
    return torch.cat(parts)


def inputs_of(front: Prefix) -> Tensor:
    """The vectors [n, width] of the one stack."""
    assert front.inputs is not None
    return front.inputs[0]


def by_layer(front: Prefix, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values as [rows, heads, n, head_dim]."""
    assert front.keys is not None
    assert front.values is not None
    return [
        (k.transpose(0, 1).expand(rows, -1, -1, -1), v.transpose(0, 1).expand(rows, -1, -1, -1))
        for k, v in zip(front.keys, front.values, strict=True)
    ]


class FrontLayer(DynamicLayer):
    """Keys and values that stand in front and never grow: a block that is computed again sees the same."""

    def __init__(self, keys: Tensor, values: Tensor, number: int) -> None:
        super().__init__()
        self.number = number
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.was_read = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The front's keys and values, then those of the tokens."""
        self.was_read = True
        refuse_other_shape((self.keys.shape[1], self.keys.shape[3]), key_states, self.number)
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


# Packs ---------------------------------------------------------------------------------------------


def pack_arguments(net: PreTrainedModel, front: Prefix | None, batch: Batch) -> dict[str, Any]:
    """What a forward of a pack takes: each of its documents has `front` before it."""
    if front is not None and front.inputs is not None:
        return _among_inputs(batch, inputs_of(front), net)
    before = 0 if front is None else front.n
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.positions[None] + before if before else batch.positions[None],
        "documents": Documents.of(batch.bounds, batch.input_ids.device),
        "logits_to_keep": batch.predict_at,
        **({"front": front} if before else {}),
    }


def _among_inputs(batch: Batch, vectors: Tensor, net: PreTrainedModel) -> dict[str, Any]:
    """The pack with the vectors [n, width] as tokens of their own at the start of each document."""
    n, n_docs, device = len(vectors), batch.n_docs, batch.input_ids.device
    bounds = batch.bounds + n * torch.arange(n_docs + 1)
    shift = n * torch.arange(1, n_docs + 1)
    at = torch.arange(batch.n_tokens) + shift.repeat_interleave(batch.bounds.diff())  # of each token
    starts = bounds[:-1, None] + torch.arange(n)
    embeds = net.get_input_embeddings()(batch.input_ids)
    rows = torch.cat([vectors.to(embeds.dtype).repeat(n_docs, 1), embeds])
    size = int(bounds[-1])
    positions = torch.arange(size) - bounds[:-1].repeat_interleave(bounds.diff())
    return {
        "inputs_embeds": spread(rows, torch.cat([starts.reshape(-1), at]).to(device), size)[None],
        "position_ids": positions.to(device)[None],
        "documents": Documents.of(bounds, device),
        "logits_to_keep": at.to(device)[batch.predict_at],
    }


# Token by token --------------------------------------------------------------------------------------


def needs_like_lengths(net: PreTrainedModel, front: Prefix) -> bool:
    """Whether rows of a batch must be of one length: padding would lie between them and a front in the cache.

    That is wrong where attention counts places: in a sliding window, or with ALiBi (in models that cannot pack).
    """
    config: Any = net.config.get_text_config()
    return front.inputs is None and (getattr(config, "sliding_window", None) is not None or not packs(net))


def first_arguments(
    net: PreTrainedModel, front: Prefix | None, ids: Tensor, mask: Tensor
) -> tuple[dict[str, Any], Tensor]:
    """The first forward of a generation: (its arguments, the mask with the front's positions).

    ids, mask  [rows, tokens], padded on the left. The front follows the padding where it stands among the inputs; in
               the cache it comes before it (see `needs_like_lengths`)
    """
    cache = DynamicCache(config=net.config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    if front is None:
        return {"input_ids": ids, "position_ids": positions, "past_key_values": cache}, mask
    rows, n = len(ids), front.n
    grown = torch.cat([mask.new_ones(rows, n), mask], 1)
    if front.inputs is None:
        for number, (keys, values) in enumerate(by_layer(front, rows)):
            if number >= len(cache.layers) or type(cache.layers[number]) not in (
                DynamicLayer,
                DynamicSlidingWindowLayer,
            ):
                raise AdapterError(_NOT_READ.format(type(net).__name__, number))
            cache.update(keys, values, number)
        return {"input_ids": ids, "position_ids": positions + n, "past_key_values": cache}, grown
    embeds = net.get_input_embeddings()(ids)
    embeds = torch.cat([inputs_of(front).to(embeds.dtype).expand(rows, -1, -1), embeds], 1)
    n_pads = (mask == 0).sum(1, keepdim=True)
    place = torch.arange(n + ids.shape[1], device=ids.device).expand(rows, -1)
    place = torch.where(place < n_pads, place + n, torch.where(place < n_pads + n, place - n_pads, place))
    embeds = embeds.gather(1, place[..., None].expand(-1, -1, embeds.shape[-1]))
    grown = grown.gather(1, place)
    positions = (grown.cumsum(1) - 1).clamp(min=0)
    return {"inputs_embeds": embeds, "position_ids": positions, "past_key_values": cache}, grown
