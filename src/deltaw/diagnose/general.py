"""What an adapter does to answers: general questions and text before and after, and rows of its own kind."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from deltaw.data.source import Row, read_rows
from deltaw.data.spec import DataSpec
from deltaw.model.model import Model
from deltaw.train.evaluate import check_rows, data_spec, evaluate_rows

MOST_ROWS = 64
"""Of a file that the loss is measured on."""


@dataclass(frozen=True)
class Forgetting:
    """General ability before and after; None or 0 where it was not measured.

    n             questions;  right_before, right_after: answered right
    lost, gained  answered right before only, after only
    perplexity_before, perplexity_after  on general text
    """

    n: int
    right_before: int
    right_after: int
    lost: int
    gained: int
    perplexity_before: float | None
    perplexity_after: float | None

    @property
    def chance(self) -> float:
        """The chance of losing this many of the changed answers or more if each change were a coin's (McNemar 1947)."""
        n = self.lost + self.gained
        return float(sum(math.comb(n, k) for k in range(self.lost, n + 1)) / 2**n)


@dataclass(frozen=True)
class Change:
    """The mean loss (nats a target token) on `n` rows without (`before`) and with the adapter (`after`)."""

    n: int
    before: float
    after: float


def forgetting(model: Model, name: str, general: Path | None, text: Path | None, limit: int | None) -> Forgetting:
    """Answer the questions of `general` and read `text` without and with adapter `name`, which is attached.

    general  rows with "choices";  text  rows to measure perplexity on;  limit: only the first rows of each

    Raises DataError for a file that cannot be read or judged.
    """
    spec = DataSpec(max_tokens=_most(model))
    questions = read_rows(general)[:limit] if general else []
    texts = read_rows(text)[:limit] if text else []
    if questions:
        check_rows(questions, "choice", None, model.task)
    right: list[list[bool]] = []
    perplexity: list[float | None] = []
    for use in (None, name):
        model.use(use)
        right.append(_right(model, questions, spec))
        perplexity.append(evaluate_rows(model, texts, "perplexity", spec)["value"] if texts else None)
    before, after = right
    return Forgetting(
        n=len(questions),
        right_before=sum(before),
        right_after=sum(after),
        lost=sum(b and not a for b, a in zip(before, after, strict=True)),
        gained=sum(a and not b for b, a in zip(before, after, strict=True)),
        perplexity_before=perplexity[0],
        perplexity_after=perplexity[1],
    )


def on_rows(model: Model, name: str, data: Path) -> Change:
    """The loss on the first MOST_ROWS rows of `data` without and with adapter `name`, which is attached."""
    rows = read_rows(data)[:MOST_ROWS]
    model.use(name)
    spec = data_spec(model, None, _most(model))
    losses = []
    for use in (None, name):
        model.use(use)
        losses.append(math.log(evaluate_rows(model, rows, "perplexity", spec)["value"]))
    return Change(len(rows), *losses)


def _right(model: Model, rows: list[Row], spec: DataSpec) -> list[bool]:
    if not rows:
        return []
    found = evaluate_rows(model, rows, "choice", spec, predictions=True)
    return [bool(p["right"]) for p in found["predictions"]]


def _most(model: Model) -> int:
    """The longest document, in tokens, that the model takes, at most 2,048."""
    limit = getattr(model.net.config.get_text_config(), "max_position_embeddings", None)
    return min(2048, int(limit)) if isinstance(limit, int) and limit > 1 else 2048
