"""What people look at before they train: how long the rows are, and which tokens are targets."""

from __future__ import annotations

import math
from itertools import groupby
from statistics import fmean, median
from typing import TYPE_CHECKING

from deltaw.data.task import CAUSAL, Task
from deltaw.data.template import Encoded, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF_CHARACTER = "\ufffd"  # what a decoder writes for bytes that are not a whole character


def length_statistics(encoded: Encoded) -> dict[str, int | float]:
    """Lengths of the examples in tokens: n (examples), min, median, p90 (nearest rank), max, mean and the sum
    `tokens`; and the counts `targets` (tokens), `cut` and `skipped` (rows).
    """
    lengths = sorted(encoded.lengths)
    return {
        "n": len(lengths),
        "min": lengths[0],
        "median": median(lengths),
        "p90": lengths[math.ceil(0.9 * len(lengths)) - 1],
        "max": lengths[-1],
        "mean": fmean(lengths),
        "tokens": encoded.n_tokens,
        "targets": encoded.n_targets,
        "cut": encoded.n_cut,
        "skipped": encoded.n_skipped,
    }


def marked(example: Example, tokenizer: PreTrainedTokenizerBase, task: Task = CAUSAL) -> list[tuple[str, bool]]:
    """The example as pieces of text, each with whether its tokens are targets; joined they are the whole
    text.

    A character whose bytes are spread over both sides of a border stands in the later piece. A label stands behind
    its text.
    """
    if task.kind == "classify":
        *read, label = example.input_ids
        return [(_decoded(tokenizer, tuple(read)), False), (task.labels[label], True)]
    pieces: list[tuple[str, bool]] = []
    end, shown = 0, ""
    for is_target, flags in groupby(example.is_target):
        begin, end = end, end + len(list(flags))
        # decoded from the start: some tokenizers drop the space of a piece's first word
        text = _decoded(tokenizer, example.input_ids[:end])
        if end < len(example.input_ids):
            text = text.rstrip(_HALF_CHARACTER)
        if text.startswith(shown):
            pieces.append((text[len(shown) :], is_target))
        else:
            pieces.append((_decoded(tokenizer, example.input_ids[begin:end]), is_target))
        shown = text
    return [(text, is_target) for text, is_target in pieces if text]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
