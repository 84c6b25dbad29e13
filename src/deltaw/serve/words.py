"""Text to token ids and back, with a base's or an adapter's own words: new tokens and chat template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from deltaw.data.chat import render
from deltaw.data.tokens import tokenize
from deltaw.errors import AdapterError, DataError
from deltaw.model.vocabulary import with_tokens

_HALF = "\ufffd"  # what decoding gives for a part of a character


class Words:
    """A tokenizer with its chat template. Nothing here changes the tokenizer it was made with."""

    def __init__(self, tokenizer: Any, n_vocab: int) -> None:
        self.tokenizer = tokenizer
        self.n_vocab = n_vocab

    def of_adapter(self, new_tokens: tuple[str, ...], template: str | None) -> Words:
        """The same with an adapter's new tokens and its own template, where it has them."""
        if not new_tokens and template is None:
            return self
        tokenizer = with_tokens(self.tokenizer, new_tokens)[0] if new_tokens else copy.copy(self.tokenizer)
        if template is not None:
            tokenizer.chat_template = template
        return Words(tokenizer, max(self.n_vocab, len(tokenizer)))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids; special: with what the tokenizer puts in front of a text. Raises DataError."""
        found = tokenize(text, self.tokenizer, special=special)
        return found.front + found.ids

    def encode_chat(self, messages: list[dict[str, str]], *, open_turn: bool = True) -> list[int]:
        """Token ids of a chat as the template writes it. Raises DataError (no template, or it refuses the turns)."""
        text = render(messages, self.tokenizer, "messages", open_turn=open_turn)
        return tokenize(text, self.tokenizer, special=False).ids  # what belongs in front, the template writes

    def check(self, ids: list[int], what: str = "prompt") -> list[int]:
        """`ids`, all of which the vocabulary has. Raises DataError."""
        if (largest := max(ids, default=0)) >= self.n_vocab:
            raise DataError(f"{what}: token {largest} is not there; this vocabulary has {self.n_vocab} tokens.")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def piece(self, token: int) -> tuple[str, list[int] | None]:
        """A token's own text and its UTF-8 bytes; None where it holds a part of a character only."""
        text = self.decode([token])
        return text, None if _HALF in text else list(text.encode())


def own_template(folder: Path) -> str | None:
    """The chat template that lies beside a saved adapter, or None. Raises AdapterError for one that cannot be read."""
    try:
        if (folder / "chat_template.jinja").is_file():
            return (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if not (folder / "tokenizer_config.json").is_file():
            return None
        found = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError) as problem:
        raise AdapterError(f"The adapter's chat template in {folder} cannot be read: {problem}") from None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    return found if isinstance(found, str) else None
