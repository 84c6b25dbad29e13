"""How many positions and tokens a base has learned, and a clear error for a document beyond them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deltaw.data.template import Example
from deltaw.errors import DataError
from deltaw.model.kinds import kind_of


def max_positions(net: PreTrainedModel) -> int | None:
    """The longest document that `net` can compute, in tokens; None where positions are rotary and set no hard limit.

    Learned positions (GPT-2, OPT, BERT) are an embedding of their own, two rows longer than the config says in OPT, and
    with rows that no token uses in front in RoBERTa.
    """
    found = getattr(net.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int):
        return None
    tokens = net.get_input_embeddings()
    tables = [m for m in net.modules() if isinstance(m, nn.Embedding) and m is not getattr(tokens, "original", tokens)]
    learned = [m for m in tables if m.num_embeddings in (found, found + 2)]
    if not learned:
        return None
    unused = [m.padding_idx + 1 for m in learned if m.num_embeddings == found and m.padding_idx is not None]
    return found - max(unused, default=0)


def positions_of(net: PreTrainedModel, n_tokens: int, n_targets: int) -> int:
    """The positions that a document takes: a classifier's label takes none, an encoder-decoder has two sequences."""
    kind = kind_of(net)
    source = n_tokens - n_targets
    return n_tokens if kind == "causal" else source if kind == "classify" else max(source, n_targets)


def refuse_beyond(net: PreTrainedModel, examples: Sequence[Example], before: int = 0) -> None:
    """Raise DataError for an example longer than the positions of `net`, or with a token that has no vector.

    before  positions that an adapter's virtual tokens take in front of each example
    """
    refuse_unknown(net, [e.input_ids for e in examples], [e.where for e in examples])
    limit = max_positions(net)
    if limit is None:
        return
    for example in examples:
        n = positions_of(net, len(example.input_ids), example.n_targets)
        if before + n > limit:
            behind = f" behind {before} virtual tokens" if before else ""
            raise DataError(
                f"{example.where}: {n} tokens{behind}, and this base has {limit} positions. "
                f"Set data.max_tokens (--max-tokens) to {limit - before} or less."
            )


def refuse_unknown(net: PreTrainedModel, documents: Sequence[Sequence[int]], where: Sequence[str]) -> None:
    """Raise DataError for a token that neither the base nor an attached adapter has a vector for.

    where  what each document is called
    """
    table: Any = net.get_input_embeddings()
    n = len(table.weight)
    rows = [slot.rows for slot in getattr(table, "slots", {}).values()]
    new = {int(i) for found in rows if found is not None for i in found.ids}
    for ids, name in zip(documents, where, strict=True):
        if unknown := [token for token in ids if not 0 <= token < n and token not in new]:
            if unknown[0] < 0:
                raise DataError(f"{name}: {unknown[0]} is no token: ids begin at 0. Mask padding, any token there.")
            raise DataError(
                f"{name}: token {unknown[0]} is not among the {n} of this base, whose tokenizer knows more.\n"
                "  Learn its word with adapter.new_tokens, take it out of the text, or load the tokenizer that fits."
            )
