"""Choosing tokens, row by row: penalties, a grammar's mask, temperature, what may be drawn, and the draw.

A row's draw depends on its logits, its request's seed and the token's number, and on nothing else: not on the other
rows, not on when the request ran or was computed again.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import SpecError
from deltaw.ops.likeliest import likeliest
from deltaw.serve.grammar import Matcher
from deltaw.serve.types import Sampling

MOST_BIAS = 100
_BLOCK = 128  # tokens whose probabilities are summed before it is decided which of them is drawn
_FIRST_RANKED = 1024  # so many of the likeliest tokens are sorted first; all only where these do not reach top_p


@dataclass(frozen=True)
class Choice:
    """A token, its log probability and the likeliest (token, logprob), where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check_sampling(s: Sampling) -> None:
    """Raise SpecError for a value out of its range."""

    def refuse(name: str, wanted: str) -> None:
        raise SpecError(f"{name} must be {wanted}, not {getattr(s, name)!r}.")

    if s.max_tokens < 1:
        refuse("max_tokens", "1 or more")
    for name in ("temperature", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        if not math.isfinite(getattr(s, name)):
            refuse(name, "a finite number")
    if s.temperature < 0:
        refuse("temperature", "0 or more")
    if not 0 < s.top_p <= 1:
        refuse("top_p", "above 0 and at most 1")
    if s.top_k < 0:
        refuse("top_k", "0 (all) or more")
    if not 0 <= s.min_p <= 1:
        refuse("min_p", "from 0 to 1")
    if s.repetition_penalty <= 0:
        refuse("repetition_penalty", "above 0")
    if any(not -MOST_BIAS <= bias <= MOST_BIAS for _, bias in s.logit_bias):
        refuse("logit_bias", f"numbers from -{MOST_BIAS} to {MOST_BIAS}")
    if s.logprobs is not None and s.logprobs < 0:
        refuse("logprobs", "0 or more")
    if any(not word for word in s.stop):
        refuse("stop", "strings that are not empty")


class Chooser:
    """What choosing one request's tokens needs to remember."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], matcher: Matcher | None = None) -> None:
        self.sampling = sampling
        self.matcher = matcher
        self.seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        self.counts: Counter[int] = Counter()
        self.n = 0
        self._prompt = set(prompt) if sampling.repetition_penalty != 1.0 else set()

    def took(self, token: int) -> None:
        """Remember that `token` became part of the answer."""
        self.n += 1
        self.counts[token] += 1
        if self.matcher is not None:
            self.matcher.accept(token)

    @property
    def problem(self) -> str | None:
        """Why the grammar gave up, or None."""
        return None if self.matcher is None else self.matcher.problem

    def uniform(self) -> float:
        """The number in [0, 1) that draws the next token."""
        raw = hashlib.blake2b(f"{self.seed}:{self.n}".encode(), digest_size=8).digest()
        return (int.from_bytes(raw, "little") >> 11) * 2.0**-53

    @property
    def edits(self) -> bool:
        """Whether `edit_` does anything."""
        s = self.sampling
        return bool(
            s.logit_bias
            or s.repetition_penalty != 1.0
            or s.presence_penalty
            or s.frequency_penalty
            or self.matcher is not None
        )

    def edit_(self, logits: Tensor) -> None:
        """Apply biases, penalties and the grammar to this row's logits [vocab], in place."""
        s = self.sampling
        if s.logit_bias:
            tokens, biases = zip(*s.logit_bias, strict=True)
            at = torch.tensor(tokens, dtype=torch.long, device=logits.device)
            logits[at] += torch.tensor(biases, dtype=torch.float32, device=logits.device)
        if s.repetition_penalty != 1.0 and (seen := self._prompt | self.counts.keys()):
            ids = torch.tensor(sorted(seen), dtype=torch.long, device=logits.device)
            found = logits[ids]
            logits[ids] = torch.where(found > 0, found / s.repetition_penalty, found * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and self.counts:
            ids = torch.tensor(list(self.counts), dtype=torch.long, device=logits.device)
            times = torch.tensor(list(self.counts.values()), dtype=logits.dtype, device=logits.device)
            logits[ids] -= s.presence_penalty + s.frequency_penalty * times
        if self.matcher is not None:
            allowed = self.matcher.allowed(len(logits)).to(logits.device)
            logits.masked_fill_(~allowed, float("-inf"))


_COLDEST = 1e-6  # float32 has no temperature below 1e-38, and 0 / 0 is no probability


def choose(logits: Tensor, choosers: Sequence[Chooser]) -> list[Choice | None]:
    """One token per row of logits [n, vocab], which may be written over; None where a row is NaN or infinite.

    Log probabilities are those of the model: before penalties, grammar and temperature, as vLLM reports them.
    """
    logits = logits.float()
    best, places = likeliest(logits)
    fine, tokens = torch.isfinite(best).tolist(), places.tolist()
    before = {
        r: logits[r].log_softmax(-1) for r, c in enumerate(choosers) if fine[r] and c.sampling.logprobs is not None
    }
    for r, chooser in enumerate(choosers):
        if fine[r] and chooser.edits:
            chooser.edit_(logits[r])
            fine[r] = chooser.problem is None
            tokens[r] = int(logits[r].argmax())
    plain = []
    for r, chooser in enumerate(choosers):
        s = chooser.sampling
        if s.temperature == 0 or not fine[r]:
            continue
        if s.top_k or s.top_p < 1 or s.min_p:
            tokens[r] = _draw_some(logits[r], s, chooser.uniform())
        else:
            plain.append(r)
    if plain:
        for r, token in zip(plain, _draw_any(logits[plain], [choosers[r] for r in plain]), strict=True):
            tokens[r] = token
    return [
        _choice(token, before.get(r), choosers[r].sampling.logprobs) if fine[r] else None
        for r, token in enumerate(tokens)
    ]


def _choice(token: int, logprobs: Tensor | None, k: int | None) -> Choice:
    if logprobs is None or k is None:
        return Choice(token)
    values, ids = logprobs.topk(min(k, len(logprobs)))
    return Choice(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))


def _draw_any(logits: Tensor, choosers: Sequence[Chooser]) -> list[int]:
    """A token per row [n, vocab], each by its probability: the first at which the running sum exceeds the uniform.

    The running sum is made of blocks first, then within one of them. logits are written over.
    """
    temperature = torch.tensor(
        [[max(c.sampling.temperature, _COLDEST)] for c in choosers], dtype=torch.float32, device=logits.device
    )
    weights = logits.sub_(logits.amax(-1, keepdim=True)).div_(temperature).exp_()
    whole = weights.shape[1] // _BLOCK * _BLOCK
    parts = [weights[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1), weights[:, whole:].sum(-1, keepdim=True)]
    sums = torch.cat(parts, 1).cumsum(-1, dtype=torch.float64)
    uniform = torch.tensor([[c.uniform()] for c in choosers], dtype=torch.float64, device=logits.device)
    wanted = uniform * sums[:, -1:]
    blocks = torch.searchsorted(sums, wanted, right=True).clamp_(max=sums.shape[1] - 1)
    within = (wanted - torch.cat([torch.zeros_like(wanted), sums], 1).gather(1, blocks)).flatten()
    drawn = []
    for row, block, rest in zip(weights, blocks.flatten().tolist(), within, strict=True):
        start = block * _BLOCK
        inner = row[start : start + _BLOCK].cumsum(-1, dtype=torch.float64)
        place = start + int(torch.searchsorted(inner, rest, right=True))
        # sums in two ways differ in their last digits: what cannot be is not drawn for that
        drawn.append(place if place < len(row) and float(row[place]) > 0 else int(row.argmax()))
    return drawn


def _draw_some(logits: Tensor, s: Sampling, uniform: float) -> int:
    """A token among those that top_k, then top_p (of what top_k left), then min_p leave; logits [vocab]."""
    probs = ((logits - logits.amax()) / max(s.temperature, _COLDEST)).softmax(-1)
    most = min(s.top_k or len(probs), len(probs))
    ranked, ids = probs.topk(min(most, _FIRST_RANKED))
    if len(ranked) < most and float(ranked.sum()) < s.top_p:
        ranked, ids = probs.topk(most)
    total = ranked.sum(dtype=torch.float64) if s.top_k else 1.0
    sums = ranked.cumsum(-1, dtype=torch.float64)
    keep = (sums - ranked < s.top_p * total) & (ranked >= s.min_p * ranked[0])
    n = max(int(keep.sum()), 1)  # both cut off an end of what is ranked
    wanted = torch.tensor(uniform, dtype=torch.float64, device=sums.device) * sums[n - 1]
    return int(ids[min(int(torch.searchsorted(sums[:n].contiguous(), wanted, right=True)), n - 1)])
