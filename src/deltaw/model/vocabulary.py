"""New tokens: rows of the embedding and of the head that alone train and are saved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.errors import BaseError, SpecError
from deltaw.model.places import Places


def with_tokens(tokenizer: Any, tokens: tuple[str, ...]) -> tuple[Any, list[int]]:
    """A copy of `tokenizer` that knows `tokens`, and their ids. The given one is not changed."""
    if tokenizer is None:
        raise BaseError("New tokens need a tokenizer; this model has none.")
    if not tokens or any(not t.strip() for t in tokens) or len(set(tokens)) != len(tokens):
        raise SpecError(f"new_tokens must be distinct and not blank; got {list(tokens)}.")
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(list(tokens))
    return grown, [int(grown.convert_tokens_to_ids(t)) for t in tokens]


def add_rows(
    ids: list[int], net: PreTrainedModel, base_tensors: Mapping[str, Tensor], places: Places
) -> dict[str, tuple[Tensor, Tensor]]:
    """Trainable rows for `ids`: of the embedding, and of the head where that is not tied to it.

    A row that the base has starts as it is there; a new one as the mean of the base's rows.
    returns  tensor name -> (ids [n], values [n, dim] float32)
    """
    number = torch.tensor(sorted(ids), dtype=torch.long)
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    taken: list[Tensor] = []
    for module in (net.get_input_embeddings(), net.get_output_embeddings()):
        name = next((n for n, m in places.modules.items() if m is _inner(module)), None)
        if name is None:
            continue
        base = base_tensors[f"{name}.weight"]
        if any(base is t for t in taken):
            continue
        taken.append(base)
        known = number < base.shape[0]
        value = base.float().mean(0).repeat(len(ids), 1)
        value[known] = base[number[known]].float()
        rows[f"{name}.weight"] = (number, value.requires_grad_())
    return rows


def _inner(module: Any) -> Any:
    """The base's own module behind a host or a swap."""
    while hasattr(module, "original"):
        module = module.original
    return module
