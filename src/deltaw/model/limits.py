"""How many positions a base has learned, and a clear error for a document beyond them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from deltaw.data.template import Example
from deltaw.errors import DataError


def max_positions(net: PreTrainedModel) -> int | None:
    """The longest document that `net` can compute, in tokens; None where positions are rotary and set no hard limit.

    Learned positions (GPT-2, OPT) are an embedding of their own, two rows longer than the config says in OPT.
    """
    found = getattr(net.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(found, int):
        return None
    tokens = net.get_input_embeddings()
    tables = [m for m in net.modules() if isinstance(m, nn.Embedding) and m is not getattr(tokens, "original", tokens)]
    return found if any(m.num_embeddings in (found, found + 2) for m in tables) else None


def refuse_beyond(net: PreTrainedModel, examples: Sequence[Example], before: int = 0) -> None:
    """Raise DataError for an example longer than the positions of `net`: it could not be computed.

    before  positions that an adapter's virtual tokens take in front of each example
    """
    limit = max_positions(net)
    for example in examples:
        if limit is not None and before + len(example.input_ids) > limit:
            behind = f" behind {before} virtual tokens" if before else ""
            raise DataError(
                f"{example.where}: {len(example.input_ids)} tokens{behind}, and this base has {limit} positions. "
                f"Set data.max_tokens (--max-tokens) to {limit - before} or less."
            )
