"""The `data:` part of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DataSpec(BaseModel):
    """Where rows come from and how a row becomes tokens.

    train, valid   a path of JSON Lines; a .parquet, .csv or .json file, or "hf:<dataset>[:split]", both read
                   by the optional `datasets` package; None where rows are given in memory
    max_tokens     the longest document in tokens, the end token included
    too_long       what happens to a longer one: keep its first `max_tokens` tokens, leave the row out (both
                   counted), or raise DataError
    template       how prompt/completion rows are written: "plain" joins them with `separator`, "chat" puts
                   them through the tokenizer's chat template as a user and an assistant turn. Rows of
                   messages always use the chat template, rows of text never do
    separator      stands between prompt and completion; left out where one of them is empty
    append_end     append the tokenizer's end token to plain documents; in a chat the template ends the turn
    labels         of an encoder that classifies: a list of them, or a JSON file with one; a completion is one of them.
                   None: those of the base
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str | None = None
    valid: str | None = None
    max_tokens: int = Field(default=512, ge=2)
    too_long: Literal["cut", "skip", "error"] = "cut"
    template: Literal["plain", "chat"] = "plain"
    separator: str = " "
    append_end: bool = True
    labels: str | tuple[str, ...] | None = None
