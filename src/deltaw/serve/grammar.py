"""Answers that obey a JSON schema: at each step only tokens that can still lead to such a text are left."""

from __future__ import annotations

import json
import threading
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from deltaw.errors import SpecError


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def allowed(self, n_vocab: int) -> Tensor:
        """[n_vocab] bool: tokens that may come next; none where the grammar gave up."""
        if self._inner.is_error():
            return torch.zeros(n_vocab, dtype=torch.bool)
        bits = np.frombuffer(self._inner.compute_bitmask(), dtype=np.uint8)
        flags = np.unpackbits(bits, bitorder="little")[:n_vocab]
        allowed = np.zeros(n_vocab, dtype=bool)  # what the tokenizer does not know is never allowed
        allowed[: len(flags)] = flags
        return torch.from_numpy(allowed)

    def accept(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._inner.consume_token(token)

    @property
    def done(self) -> bool:
        """Whether nothing can follow: the text is complete, or (see `problem`) the grammar gave up."""
        return bool(self._inner.is_stopped())

    @property
    def problem(self) -> str | None:
        """Why the grammar gave up, or None."""
        return f"The JSON schema: {self._inner.get_error()[:300]}" if self._inner.is_error() else None


class Grammars:
    """Makes matchers; keeps what llguidance needs of each tokenizer."""

    def __init__(self) -> None:
        self._known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def matcher(self, tokenizer: Any, ends: set[int], schema: str) -> Matcher:
        """For answers of `tokenizer` that end with one of `ends` and obey `schema` (JSON text; "{}": any object).

        No white space between JSON's signs is allowed: a model cannot go on with blanks for ever.

        Raises SpecError for a schema that is not JSON, that llguidance does not support or finds too large, and where
        there is no tokenizer of the fast kind.
        """
        try:
            from llguidance import LLMatcher  # a large library that only such requests need
        except ImportError:
            raise SpecError("Answers by a JSON schema need llguidance: pip install 'deltaw[serve]'.") from None
        try:
            given = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise SpecError(f"The JSON schema is not JSON: {error}") from None
        if not isinstance(given, dict | bool):
            raise SpecError(f"A JSON schema is an object, not {schema[:60]!r}.")
        try:
            known = self._of(tokenizer, ends)
            grammar = LLMatcher.grammar_from_json_schema(
                json.dumps(given or {"type": "object"}), overrides={"whitespace_flexible": False}
            )
            inner = LLMatcher(known, grammar)
        except (ValueError, TypeError, RecursionError) as error:
            raise SpecError(f"This JSON schema cannot be followed: {str(error)[:300]}") from None
        if inner.is_error():
            raise SpecError(f"This JSON schema cannot be followed: {inner.get_error()[:300]}")
        return Matcher(inner)

    def _of(self, tokenizer: Any, ends: set[int]) -> Any:
        from llguidance.hf import from_tokenizer

        if tokenizer is None or not getattr(tokenizer, "is_fast", False):
            raise SpecError("A JSON schema needs a tokenizer of the fast kind; this base has none.")
        with self._lock:
            if tokenizer not in self._known:
                self._known[tokenizer] = from_tokenizer(tokenizer, eos_token=sorted(ends) or None)
            return self._known[tokenizer]
