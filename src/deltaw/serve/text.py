"""From tokens to text as it settles: whole characters, and nothing that a stop string may yet take back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HALF = "\N{REPLACEMENT CHARACTER}"  # what a decoder gives for bytes that are no character (yet)
_CONTEXT = 4  # tokens of the prompt that the first token is decoded behind: it may begin with a space


class TextStream:
    """The text of one answer, token by token."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        """tokenizer  None: there is no text. prompt: its last tokens decide how the first one is written."""
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(prompt[-_CONTEXT:])  # those whose text is `_before`, then those whose text is not yet given
        self._settled = len(self._ids)
        self._before = "" if tokenizer is None else self._decode(self._ids)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that `token` settles, and whether a stop string ended the answer (the text ends before it)."""
        if self._tokenizer is None:
            return "", False
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) > len(self._before) and not text.endswith(_HALF):
            self._held += text[len(self._before) :]
            self._ids = self._ids[self._settled :]
            self._settled = len(self._ids)
            self._before = self._decode(self._ids)
        return self._give()

    def _give(self) -> tuple[str, bool]:
        found = [at for word in self._stop if (at := self._held.find(word)) >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        back = max((_overlap(self._held, word) for word in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - back], self._held[len(self._held) - back :]
        return text, False

    def end(self) -> str:
        """The rest, when no token follows; bytes of a character that never came are left out."""
        if self._tokenizer is None:
            return ""
        rest = self._decode(self._ids)[len(self._before) :] if len(self._ids) > self._settled else ""
        return self._held + rest.rstrip(_HALF)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, word: str) -> int:
    """The length of the longest end of `text` that is a beginning of `word`, short of all of it."""
    return next((n for n in range(min(len(text), len(word) - 1), 0, -1) if text.endswith(word[:n])), 0)
