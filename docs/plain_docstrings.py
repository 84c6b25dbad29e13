"""Docstrings here are plain text laid out by hand: the first paragraph is prose, what follows keeps its columns."""

from __future__ import annotations

from typing import Any

import griffe


class PlainDocstrings(griffe.Extension):
    """Put everything after a docstring's first paragraph into a text block."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        first, _gap, rest = obj.docstring.value.strip().partition("\n\n")
        obj.docstring.value = f"{first}\n\n```text\n{rest.rstrip()}\n```" if rest.strip() else first
