"""Encoder-decoders: an encoder reads the prompt, a decoder answers it, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from deltaw.core.prefix import Prefix
from deltaw.data.pack import Batch
from deltaw.errors import BaseError
from deltaw.model.classify import padded, tell_rows
from deltaw.model.front import decoder_cache, encoder_arguments, refuse_unread
from deltaw.model.host import Run

if TYPE_CHECKING:
    from deltaw.model.model import Model

Choose = Callable[[Tensor], Tensor]
GiveUp = Callable[[int, list[int]], bool]


def start_token(net: PreTrainedModel) -> int:
    """What stands before an answer's first token. Raises BaseError."""
    for source in (net.config, getattr(net, "generation_config", None)):
        found = getattr(source, "decoder_start_token_id", None)
        if isinstance(found, int):
            return found
    raise BaseError(f"the config of this {type(net).__name__} has no decoder_start_token_id.\n  Add it to config.json.")


def answer_logits(
    net: PreTrainedModel,
    front: Prefix | None,
    input_ids: Tensor,
    decoder_ids: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits of padded rows: input_ids [batch, n], what the decoder reads [batch, m] -> [batch, m, vocab]."""
    inputs = encoder_arguments(net, front, input_ids, mask)
    cache = decoder_cache(net, front, len(input_ids), grows=False)
    more = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
    logits: Tensor = net(**inputs, decoder_input_ids=decoder_ids, **more).logits
    refuse_unread(net, cache)
    return logits


def pack_answer_logits(net: PreTrainedModel, front: Prefix | None, batch: Batch, run: Run) -> Tensor:
    """Logits of a pack's targets, each document's answer behind its source: [n_targets, vocab].

    run  is told how long the rows are, so that dropout of a document does not depend on the others
    """
    bounds = batch.bounds.tolist()
    owner = torch.searchsorted(batch.bounds, batch.predict_at.cpu(), right=True) - 1
    counts = torch.bincount(owner, minlength=batch.n_docs).tolist()
    sources, answers = [], []
    first = torch.tensor([start_token(net)], dtype=torch.long, device=batch.input_ids.device)
    for start, end, n in zip(bounds[:-1], bounds[1:], counts, strict=True):
        sources.append(batch.input_ids[start : end - n])
        answers.append(torch.cat([first, batch.input_ids[end - n : end]])[:n])
    ids, mask = padded(sources, net.config.pad_token_id)
    decoder_ids, _ = padded(answers, net.config.pad_token_id)
    n_in = ids.shape[1] + (front.n if front is not None and front.inputs is not None else 0)
    tell_rows(run, n_in, decoder_ids.shape[1])
    logits = answer_logits(net, front, ids, decoder_ids, mask)
    longest = decoder_ids.shape[1]
    real = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(counts)])
    return logits.reshape(-1, logits.shape[-1]).index_select(0, real.to(logits.device))


# Token by token ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answering:
    """How answers are made: the next token from logits [rows, vocab], what ends one, how long one gets."""

    choose: Choose
    ends: frozenset[int]
    most: int
    give_up: GiveUp | None = None


@torch.no_grad()
def answer(model: Model, prompts: Sequence[Sequence[int]], how: Answering, batch_size: int) -> list[list[int]]:
    """For each prompt (token ids) the tokens of its answer, without the end token."""
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    front = model.front()
    for start in range(0, len(order), batch_size):
        _batch(model.net, front, prompts, order[start : start + batch_size], answers, how)
    return answers


def _batch(
    net: PreTrainedModel,
    front: Prefix | None,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    answers: list[list[int]],
    how: Answering,
) -> None:
    """Fill `answers` for the prompts numbered `rows`; finished ones leave the batch."""
    device = net.device
    given_ids = [torch.tensor(prompts[i], dtype=torch.long, device=device) for i in rows]
    ids, mask = padded(given_ids, net.config.pad_token_id)
    given: dict[str, Any] = encoder_arguments(net, front, ids, mask)
    mask = given.get("attention_mask")
    states = net.get_encoder()(**given).last_hidden_state
    cache = decoder_cache(net, front, len(rows), grows=True)
    last = torch.full((len(rows), 1), start_token(net), dtype=torch.long, device=device)
    for number in range(how.most):
        out = net(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=last,
            past_key_values=cache,
            use_cache=True,
        )
        chosen, keep = how.choose(out.logits[:, -1]), []
        for r, (i, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token in how.ends:
                continue
            answers[i].append(token)
            if how.give_up is None or not how.give_up(i, answers[i]):
                keep.append(r)
        if not keep or number + 1 == how.most:
            return
        last = chosen[:, None]
        if len(keep) < len(rows):
            index = torch.tensor(keep, dtype=torch.long, device=device)
            cache.batch_select_indices(index)
            last, states = last[index], states[index]
            mask = None if mask is None else mask[index]
            rows = [rows[r] for r in keep]
