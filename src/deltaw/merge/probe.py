"""How far a merged model is from the model it was merged from, on real text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.core.adapter import Adapter
from deltaw.errors import BadInput, WorkFailed
from deltaw.model.classify import label_logits
from deltaw.model.kinds import kind_of
from deltaw.model.load import load_transformers
from deltaw.model.model import Model
from deltaw.model.quantised import Format
from deltaw.model.seq2seq import answer_logits, start_token

MOST_TOKENS = 1024
ROW = 16
"""Tokens of a row that a classifier is compared on: short, so that there are many, and within any base's positions."""


@dataclass(frozen=True)
class Probe:
    """Logits of the merged model, read back from its folder, against base + adapter in float32.

    n_tokens         tokens compared
    kind             "text", or "bytes" where the base has no tokenizer, or one that knows no word of it: the text's
                     bytes as token numbers
    logit_max        largest absolute difference;  logit_mean  mean absolute difference
    top1             share of tokens after which both find the same next token the likeliest; of a classifier, of the
                     rows of tokens that get the same label
    perplexity_before, perplexity_after  of the unmerged and of the merged model on those tokens; a classifier has none
    """

    n_tokens: int
    kind: str
    logit_max: float
    logit_mean: float
    top1: float
    perplexity_before: float | None
    perplexity_after: float | None


def probe_text() -> str:
    """The text that ships with the package: a page of Pride and Prejudice (1813, public domain)."""
    return files("deltaw.merge").joinpath("probe.txt").read_text(encoding="utf-8")


def unmerged_logits(
    folder: Path, adapter: Adapter, tokenizer: Any, text: str, how: Format | None = None
) -> tuple[Tensor, Tensor, str]:
    """Token numbers [1, n], logits [n, vocab] (or [rows, labels]) of base + adapter in float32, and the kind of tokens.

    how   the format that the base is quantised to; None: as its folder has it
    """
    labels = adapter.provenance.get("labels") or None
    model = Model(load_transformers(folder, "float32", how, labels), tokenizer, None, folder)
    model.attach(adapter)
    ids, kind = _tokens(model, adapter, text)
    with torch.inference_mode():
        return ids, _logits(model.net, ids), kind


def _logits(net: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [n, vocab] of tokens [1, n]: after each; of a decoder that is to write down what the encoder reads; or
    [rows, labels] of the tokens cut into rows."""
    kind = kind_of(net)
    if kind == "classify":
        return label_logits(net, None, _in_rows(ids, net))
    if kind == "seq2seq":
        shifted = torch.cat([torch.full((1, 1), start_token(net), dtype=torch.long), ids[:, :-1]], 1)
        return answer_logits(net, None, ids, shifted)[0]
    logits: Tensor = net(input_ids=ids, use_cache=False).logits[0]
    return logits


def _in_rows(ids: Tensor, net: PreTrainedModel) -> Tensor:
    """The tokens [1, n] in rows of up to ROW; a rest is left out. One row where the network cannot take several."""
    size = min(ROW, ids.shape[1])
    rows = ids[0, : ids.shape[1] // size * size].view(-1, size)
    return rows if net.config.get_text_config().pad_token_id is not None else rows[:1]


def compare_folder(folder: Path, dtype: str, ids: Tensor, wanted: Tensor, kind: str) -> Probe:
    """Load the merged folder with plain transformers in `dtype` and compare it with `wanted`.

    Raises WorkFailed when the merged model's logits are not finite.
    """
    net = load_transformers(folder, dtype)
    with torch.inference_mode():
        found = _logits(net, ids)
    largest, total, same, n = 0.0, 0.0, 0, 0
    for mine, theirs in zip(torch.split(found, 64), torch.split(wanted, 64), strict=True):
        known = theirs > float("-inf")  # not so for vocabulary that no one has
        apart = (mine.float() - theirs)[known].abs()
        if not bool(torch.isfinite(apart).all()):
            raise WorkFailed(
                f"The merged model gives NaN or Inf in {dtype}. Nothing was written; check that base and "
                "adapter work in this dtype, or choose --dtype float32."
            )
        largest = max(largest, float(apart.max()))
        total += float(apart.sum(dtype=torch.float64))
        n += apart.numel()
        same += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    apart_by: list[float | None] = [None, None]
    if kind_of(net) != "classify":
        ahead = 1 if kind_of(net) == "causal" else 0
        apart_by = [_perplexity(ids[0], logits, ahead) for logits in (wanted, found)]
    return Probe(ids.shape[1], kind, largest, total / n, same / len(found), *apart_by)


def _perplexity(ids: Tensor, logits: Tensor, ahead: int) -> float:
    """exp of the mean negative log-likelihood of the tokens. ids [n]; logits [n, vocab] of what comes `ahead`."""
    if len(ids) < 2:
        return math.nan
    total = 0.0
    for rows, wanted in zip(torch.split(logits[: len(ids) - ahead], 64), torch.split(ids[ahead:], 64), strict=True):
        total += float(F.cross_entropy(rows.float(), wanted, reduction="sum"))
    return math.exp(total / (len(ids) - ahead))


def _tokens(model: Model, adapter: Adapter, text: str) -> tuple[Tensor, str]:
    """The text as tokens, with the adapter's own vocabulary at the end."""
    vocab = model.net.get_input_embeddings().weight.shape[0]
    rows = sorted({r for item in adapter.replaced for r in item.rows or ()})[:64]
    limit = getattr(model.net.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    limit = MOST_TOKENS if model.kind == "classify" else limit  # its tokens are cut into rows
    n = max(1, min(MOST_TOKENS, int(limit)) - len(rows))
    if not text:
        raise BadInput("The text to compare logits on is empty: give some, or none for a page of Jane Austen.")
    known = [] if model.tokenizer is None else model.tokenizer(text, truncation=True, max_length=n)["input_ids"]
    kind = "text" if known else "bytes"  # a vocabulary may hold none of its words
    ids = known or [byte % vocab for byte in text.encode()][:n]
    return torch.tensor([ids + rows], dtype=torch.long), kind
