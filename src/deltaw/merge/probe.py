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

from deltaw.core.adapter import Adapter
from deltaw.errors import WorkFailed
from deltaw.model.load import load_transformers
from deltaw.model.model import Model
from deltaw.model.quantised import Format

MOST_TOKENS = 1024


@dataclass(frozen=True)
class Probe:
    """Logits of the merged model, read back from its folder, against base + adapter in float32.

    n_tokens         tokens compared
    kind             "text", or "bytes" where the base has no tokenizer: the text's bytes as token numbers
    logit_max        largest absolute difference;  logit_mean  mean absolute difference
    top1             share of tokens after which both find the same next token the likeliest
    perplexity_before, perplexity_after  of the unmerged and of the merged model on those tokens
    """

    n_tokens: int
    kind: str
    logit_max: float
    logit_mean: float
    top1: float
    perplexity_before: float
    perplexity_after: float


def probe_text() -> str:
    """The text that ships with the package: a page of Pride and Prejudice (1813, public domain)."""
    return files("deltaw.merge").joinpath("probe.txt").read_text(encoding="utf-8")


def unmerged_logits(
    folder: Path, adapter: Adapter, tokenizer: Any, text: str, how: Format | None = None
) -> tuple[Tensor, Tensor, str]:
    """Token numbers [1, n], logits [n, vocab] of base + adapter in float32, and the kind of tokens.

    how   the format that the base is quantised to; None: as its folder has it
    """
    model = Model(load_transformers(folder, "float32", how), tokenizer, None, folder)
    model.attach(adapter)
    ids, kind = _tokens(model, adapter, text)
    with torch.inference_mode():
        return ids, model.logits(ids)[0], kind


def compare_folder(folder: Path, dtype: str, ids: Tensor, wanted: Tensor, kind: str) -> Probe:
    """Load the merged folder with plain transformers in `dtype` and compare it with `wanted`.

    Raises WorkFailed when the merged model's logits are not finite.
    """
    net = load_transformers(folder, dtype)
    with torch.inference_mode():
        found = net(input_ids=ids, use_cache=False).logits[0]
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
    apart_by = [_perplexity(ids[0], logits) for logits in (wanted, found)]
    return Probe(ids.shape[1], kind, largest, total / n, same / ids.shape[1], *apart_by)


def _perplexity(ids: Tensor, logits: Tensor) -> float:
    """exp of the mean negative log-likelihood of each token after the first. ids [n], logits [n, vocab]."""
    if len(ids) < 2:
        return math.nan
    total = 0.0
    for rows, wanted in zip(torch.split(logits[:-1], 64), torch.split(ids[1:], 64), strict=True):
        total += float(F.cross_entropy(rows.float(), wanted, reduction="sum"))
    return math.exp(total / (len(ids) - 1))


def _tokens(model: Model, adapter: Adapter, text: str) -> tuple[Tensor, str]:
    """The text as tokens, with the adapter's own vocabulary at the end."""
    vocab = model.net.get_input_embeddings().weight.shape[0]
    rows = sorted({r for item in adapter.replaced for r in item.rows or ()})[:64]
    limit = getattr(model.net.config.get_text_config(), "max_position_embeddings", None) or MOST_TOKENS
    n = max(1, min(MOST_TOKENS, int(limit)) - len(rows))
    if model.tokenizer is None:
        ids = [byte % vocab for byte in text.encode()]
        return torch.tensor([ids[:n] + rows]), "bytes"
    ids = model.tokenizer(text, truncation=True, max_length=n)["input_ids"]
    return torch.tensor([ids + rows]), "text"
