"""Text to token ids with the characters each token holds, in one call of the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from deltaw.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "a"
_SPACE = "\u0120"  # the letter for a space in the byte-level alphabet


@dataclass(frozen=True)
class Tokens:
    """Tokens of one text.

    front   ids that the tokenizer puts before every text (BOS), which hold no character
    ids     ids of the text itself
    spans   of each of `ids`, the characters [start, end) of the text that it holds
    """

    front: list[int]
    ids: list[int]
    spans: list[tuple[int, int]]


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase, *, special: bool) -> Tokens:
    """The tokens of `text`.

    special   let the tokenizer add what it adds by itself: what it puts in front is kept in `front`, what it
              puts at the end is dropped (who wants an end token appends it, so that there are never two)

    Raises DataError if the tokenizer cannot give offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} cannot say which characters a token holds.\n"
            "  Targets are found by characters: load a fast tokenizer (one with a tokenizer.json)."
        )
    out = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,  # no note about documents longer than the model: max_tokens decides
    )
    ids, spans = list(out["input_ids"]), [(start, end) for start, end in out["offset_mapping"]]
    added = [bool(mask) for mask in out["special_tokens_mask"]]  # not of a special token written in the text
    if all(added) and text != _PROBE:  # nothing stands between what is in front and what is at the end
        return Tokens(tokenize(_PROBE, tokenizer, special=special).front, [], [])
    begin = next((i for i, is_added in enumerate(added) if not is_added), len(ids))
    end = next((i + 1 for i in range(len(ids) - 1, begin - 1, -1) if not added[i]), begin)
    body = ids[begin:end]
    return Tokens(ids[:begin], body, _with_trimmed_spaces(tokenizer, body, spans[begin:end], len(text)))


def _with_trimmed_spaces(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], spans: list[tuple[int, int]], length: int
) -> list[tuple[int, int]]:
    """Spans with the spaces around a token, which byte-level tokenizers with `trim_offsets` leave out.

    length   characters of the whole text
    """
    gaps = [after - before for before, after in pairwise([0, *(at for span in spans for at in span), length])]
    before, after = gaps[0::2], gaps[2::2]  # between a token and its neighbours
    if all(gap <= 0 for gap in before) and all(gap <= 0 for gap in after):
        return spans
    whole = []
    for i, (piece, (start, end)) in enumerate(zip(tokenizer.convert_ids_to_tokens(ids), spans, strict=True)):
        leading = len(piece) - len(piece.lstrip(_SPACE))
        trailing = len(piece) - len(piece.rstrip(_SPACE)) if leading < len(piece) else 0
        whole.append((start - max(min(leading, before[i]), 0), end + max(min(trailing, after[i]), 0)))
    return whole
