"""Token by token: many prompts in one batch, finished rows leave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from deltaw.core.prefix import Prefix
from deltaw.errors import DataError, WorkFailed
from deltaw.model.limits import max_positions, refuse_unknown
from deltaw.model.model import Model
from deltaw.model.seq2seq import Answering, answer
from deltaw.model.virtual import first_arguments, needs_like_lengths

GiveUp = Callable[[int, list[int]], bool]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature  0: the most likely one
    top_p        keep the smallest set of tokens whose probability reaches this
    seed         of the random stream; the same prompts, batch and seed give the same tokens
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def end_tokens(model: Model) -> set[int]:
    """The ids that end an answer: the tokenizer's end token and those of the generation config."""
    ends: set[int] = set()
    for source in (model.tokenizer, getattr(model.net, "generation_config", None)):
        found = getattr(source, "eos_token_id", None)
        ends |= set(found) if isinstance(found, list) else {found} if found is not None else set()
    return ends


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 64,
    give_up: GiveUp | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids) until an end token or `max_new_tokens`.

    give_up  called as (prompt number, tokens so far) after each token; True ends that row at once
    returns  for each prompt its new tokens, without the end token; an answer ends where the base has no more positions

    Raises DataError for a prompt that leaves no position for an answer, or has a token without a vector.
    """
    sampling = sampling or Sampling()
    rng = torch.Generator().manual_seed(sampling.seed)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    ends = end_tokens(model)
    if model.kind == "classify":
        raise DataError("A text classifier has no words to answer with: ask for its label (deltaw eval, generate).")
    refuse_unknown(model.net, prompts, [f"Prompt {i + 1}" for i in range(len(prompts))])
    if model.kind == "seq2seq":
        how = Answering(lambda logits: _choose(logits, sampling, rng), frozenset(ends), max_new_tokens, give_up)
        with model.run.keeping_forms():
            return answer(model, prompts, how, batch_size)
    front = model.front()
    limit = _positions_left(model, front)
    if limit is not None and prompts and len(prompts[order[0]]) >= limit:
        beside = f" beside {front.n} virtual tokens" if front is not None else ""
        raise DataError(
            f"Prompt {order[0] + 1} has {len(prompts[order[0]])} tokens, and this base has {limit} positions{beside}: "
            "nothing is left for an answer. Shorten it."
        )
    alike = front is not None and needs_like_lengths(model.net, front)
    until = _until(prompts, limit, give_up)
    with model.run.keeping_forms():
        for rows in _batches(order, prompts, batch_size, alike):
            _batch(model, front, prompts, rows, answers, max_new_tokens, ends, sampling, rng, until)
    return answers


def _positions_left(model: Model, front: Prefix | None) -> int | None:
    """The positions that virtual tokens leave for prompt and answer; None: any number."""
    limit = max_positions(model.net)
    return limit if limit is None or front is None else limit - front.n


def _batches(order: list[int], prompts: Sequence[Sequence[int]], size: int, alike: bool) -> Iterator[list[int]]:
    """The prompts' numbers in `order`, at most `size` at a time; only those of one length together if `alike`."""
    groups = [list(g) for _, g in groupby(order, key=lambda i: len(prompts[i]))] if alike else [order]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _until(prompts: Sequence[Sequence[int]], limit: int | None, give_up: GiveUp | None) -> GiveUp | None:
    """`give_up`, and a row also ends where the base has no more positions."""
    if limit is None:
        return give_up
    return lambda i, tokens: len(prompts[i]) + len(tokens) >= limit or (give_up is not None and give_up(i, tokens))


def _batch(
    model: Model,
    front: Prefix | None,
    prompts: Sequence[Sequence[int]],
    rows: list[int],
    answers: list[list[int]],
    max_new_tokens: int,
    ends: set[int],
    sampling: Sampling,
    rng: torch.Generator,
    give_up: GiveUp | None,
) -> None:
    """Fill `answers` for the prompts numbered `rows`, padded on the left."""
    longest = max(len(prompts[i]) for i in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(ids)
    for r, i in enumerate(rows):
        ids[r, longest - len(prompts[i]) :] = torch.tensor(prompts[i], dtype=torch.long)
        mask[r, longest - len(prompts[i]) :] = 1
    inputs, mask = first_arguments(model.net, front, ids, mask)
    cache, positions = inputs["past_key_values"], inputs["position_ids"]
    for number in range(max_new_tokens):
        out = model.net(**inputs, attention_mask=mask, use_cache=True, logits_to_keep=1)
        chosen = _choose(out.logits[:, -1], sampling, rng)
        keep = []
        for r, (i, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if token in ends:
                continue
            answers[i].append(token)
            if give_up is None or not give_up(i, answers[i]):
                keep.append(r)
        if not keep or number + 1 == max_new_tokens:
            return
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        if len(keep) < len(rows):
            index = torch.tensor(keep, dtype=torch.long, device=model.device)
            cache.batch_select_indices(index)
            ids, positions, mask = ids[index], positions[index], mask[index]
            rows = [rows[r] for r in keep]
        inputs = {"input_ids": ids, "position_ids": positions, "past_key_values": cache}
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)


_COLDEST = 1e-6  # the most likely token alone, to float32


def _choose(logits: Tensor, sampling: Sampling, rng: torch.Generator) -> Tensor:
    if not bool(torch.isfinite(logits.amax(-1)).all()):
        raise WorkFailed("The logits are NaN or infinite: the adapter or the base is broken. Nothing was answered.")
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = (logits.float() / max(sampling.temperature, _COLDEST)).softmax(-1)
    if sampling.top_p < 1:
        ranked, where = probs.sort(-1, descending=True)
        beyond = ranked.cumsum(-1) - ranked >= sampling.top_p
        beyond[..., 0] = False  # the likeliest token always stays
        probs = torch.zeros_like(probs).scatter(-1, where, ranked.masked_fill(beyond, 0.0))
    return torch.multinomial(probs.cpu(), 1, generator=rng).squeeze(-1).to(logits.device)  # one stream on any device
