"""A row as token ids, and which of them are targets.

The whole row is written as one text and tokenized once. A token is a target by where its characters stand in
that text, never by its id: so the end token is a target where it is also the padding token, and a token that
holds the last letter of a prompt and the first of its completion is one token, and a target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltaw.data.chat import Message, assistant_spans, render
from deltaw.data.source import Row
from deltaw.data.spec import DataSpec
from deltaw.data.task import CAUSAL, Side, Task, sides, source_side
from deltaw.data.tokens import tokenize
from deltaw.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A row as tokens.

    input_ids   token ids
    is_target   of each token: is it to be predicted from the tokens before it? Never true of the first
    where       like "train.jsonl line 412"
    was_cut     tokens beyond `max_tokens` were left out
    """

    input_ids: tuple[int, ...]
    is_target: tuple[bool, ...]
    where: str
    was_cut: bool = False

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.is_target), "one flag a token"
        assert not any(self.is_target[:1]), "the first token has nothing to be predicted from"

    @property
    def n_targets(self) -> int:
        """How many tokens are targets."""
        return sum(self.is_target)


@dataclass(frozen=True)
class Encoded:
    """Rows as examples, and what became of them.

    n_rows      rows given: the examples and the skipped ones
    n_cut       examples cut to `max_tokens`
    n_skipped   rows left out because they were too long
    n_tokens    tokens of the examples
    n_targets   of these, how many are targets
    """

    examples: list[Example]
    n_rows: int
    n_cut: int
    n_skipped: int
    n_tokens: int
    n_targets: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of each example."""
        return [len(example.input_ids) for example in self.examples]


@dataclass(frozen=True)
class _Document:
    """A row before anything is cut; `start` is the first token that belongs to what is to be learned.

    sides  what encoder and decoder (or classifier) get, where these are two: each is cut by itself
    """

    ids: list[int]
    is_target: list[bool]
    start: int
    sides: tuple[Side, Side] | None = None

    @property
    def length(self) -> int:
        """What `max_tokens` limits: all tokens, or those of the longer side."""
        return len(self.ids) if self.sides is None else max(len(side.ids) for side in self.sides)


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, task: Task = CAUSAL) -> Example | None:
    """The row as tokens with its targets; None if it is too long and the spec says to skip such rows.

    task   what the base computes. The answer of an encoder-decoder follows the source's tokens; a label is one
           token behind the text, whose id is the label's number

    Raises DataError if the row is too long and the spec says so, the tokenizer lacks an end token or chat
    template that the spec asks for, or the template cannot say which words are the assistant's.
    """
    return _fit(row, _document(row, tokenizer, spec, task), spec)


def encode_all(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, spec: DataSpec, task: Task = CAUSAL) -> Encoded:
    """Every row as tokens.

    Raises DataError as `encode` does, and if a row has no target (it names the first) or every row is too
    long.
    """
    examples: list[Example] = []
    skipped: list[int] = []
    without: list[str] = []
    for row in rows:
        document = _document(row, tokenizer, spec, task)
        example = _fit(row, document, spec)
        if example is None:
            skipped.append(document.length)
        elif any(example.is_target):
            examples.append(example)
        else:
            without.append(f"{row.where}: no token of this row is a target: {_why_none(row, document, spec)}")
    if without:
        more = f"\n  {len(without) - 1} more of the {len(rows)} rows have none." if len(without) > 1 else ""
        raise DataError(without[0] + more)
    if not examples:
        raise DataError(_none_left(rows, skipped, spec))
    return Encoded(
        examples=examples,
        n_rows=len(rows),
        n_cut=sum(example.was_cut for example in examples),
        n_skipped=len(skipped),
        n_tokens=sum(len(example.input_ids) for example in examples),
        n_targets=sum(example.n_targets for example in examples),
    )


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, task: Task = CAUSAL) -> list[int]:
    """What generation starts from: the ids of the training example before its first target.

    In a chat that is everything up to and with the words that open the assistant's first turn; for an encoder
    what it reads. Nothing is cut: a prompt without its end would ask something else.

    Raises DataError as `encode` does, and if no token stands before the answer (a row of text, or an empty
    prompt where the tokenizer puts nothing in front): the answer itself would be given away.
    """
    if task.kind != "causal":
        return source_side(row, tokenizer, spec, task).ids
    if row.messages is not None and not any(message["role"] == "assistant" for message in row.messages):
        text = render(row.messages, tokenizer, row.where, tools=row.tools, open_turn=True)
        return tokenize(text, tokenizer, special=False).ids
    document = _document(row, tokenizer, spec.model_copy(update={"append_end": False}), task)
    if row.text is not None or document.start == 0:
        raise DataError(
            f"{row.where}: there is nothing to generate from: "
            + ("the row is plain text." if row.text is not None else "the prompt is empty.")
            + "\n  Measure such rows by loss or perplexity, or give them a prompt."
        )
    return document.ids[: document.start]


def _document(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, task: Task) -> _Document:
    if task.kind != "causal":
        source, learned = sides(row, tokenizer, spec, task)
        n, m = len(source.ids), len(learned.ids)
        return _Document([*source.ids, *learned.ids], [False] * n + [True] * m, n, (source, learned))
    if row.messages is not None:
        return _chat(row.messages, row, tokenizer)
    if row.prompt is not None and spec.template == "chat":
        asked: Message = {"role": "user", "content": row.prompt}
        return _chat([asked, {"role": "assistant", "content": row.completion}], row, tokenizer)
    return _plain(row, tokenizer, spec)


def _plain(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> _Document:
    """Prompt and completion joined, or a text, with the end token."""
    prompt, learned = row.prompt or "", row.text or row.completion or ""
    joined = prompt + spec.separator + learned if prompt and learned else prompt + learned
    tokens = tokenize(joined, tokenizer, special=True)
    ids = tokens.front + tokens.ids
    inside = (i for i, (_, end) in enumerate(tokens.spans, start=len(tokens.front)) if end > len(prompt))
    start = next(inside, len(ids))
    if spec.append_end:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{row.where}: an end token is to be appended, and this tokenizer has none (eos_token).\n"
                "  Set the tokenizer's eos_token, or data.append_end=false (generation will then not stop)."
            )
        ids = [*ids, int(tokenizer.eos_token_id)]
    return _Document(ids, [i >= max(start, 1) for i in range(len(ids))], start)


def _chat(messages: list[Message], row: Row, tokenizer: PreTrainedTokenizerBase) -> _Document:
    """The chat as its template writes it, the assistant's words as targets."""
    text, spans = assistant_spans(messages, tokenizer, row.where, row.tools)
    tokens = tokenize(text, tokenizer, special=False)  # what belongs in front, the template writes
    is_target = [any(end > begin and start < stop for begin, stop in spans) for start, end in tokens.spans]
    if spans and not any(is_target):
        raise DataError(
            f"{row.where}: no token holds a word of the assistant's turns.\n"
            "  Check the chat template, or give the assistant something to say."
        )
    start = is_target.index(True) if True in is_target else len(is_target)
    return _Document(tokens.ids, [flag and i > 0 for i, flag in enumerate(is_target)], start)


def _fit(row: Row, document: _Document, spec: DataSpec) -> Example | None:
    n, limit = document.length, spec.max_tokens
    if n > limit and spec.too_long == "skip":
        return None
    if n > limit and spec.too_long == "error":
        raise DataError(
            f"{row.where}: the row has {n} tokens, max_tokens is {limit}.\n"
            f"  Set data.max_tokens={n} or more, or data.too_long=cut or skip."
        )
    ids, is_target = document.ids[:limit], document.is_target[:limit]
    if document.sides is not None:
        source, learned = (side.cut(limit) for side in document.sides)
        ids, is_target = [*source, *learned], [False] * len(source) + [True] * len(learned)
    return Example(input_ids=tuple(ids), is_target=tuple(is_target), where=row.where, was_cut=n > limit)


def _why_none(row: Row, document: _Document, spec: DataSpec) -> str:
    """Why an example has no target, and what to do."""
    if any(document.is_target):
        first = document.is_target.index(True) + 1
        return (
            f"the first is token {first} of {len(document.ids)}, and the row is cut to max_tokens "
            f"{spec.max_tokens}.\n  Raise data.max_tokens, shorten the prompt, or set data.too_long=skip."
        )
    if row.messages is not None:
        roles = ", ".join(str(message["role"]) for message in row.messages)
        return f"the assistant says nothing (roles: {roles}).\n  Add an assistant turn, or remove the row."
    if row.completion == "" and not spec.append_end and row.prompt:
        return "the completion is empty and append_end false.\n  Set data.append_end=true, or remove the row."
    return (
        f"it has {len(document.ids)} token(s), and nothing stands before the first to predict it from.\n"
        "  Give it more text, or remove the row."
    )


def _none_left(rows: Sequence[Row], skipped: list[int], spec: DataSpec) -> str:
    if not rows:
        return "there are no rows to encode.\n  Give at least one row."
    return (
        f"no row of {rows[0].source} is left: all {len(skipped)} are longer than max_tokens "
        f"{spec.max_tokens} (the shortest has {min(skipped)} tokens, the longest {max(skipped)}).\n"
        f"  Set data.max_tokens={max(skipped)}, or data.too_long=cut."
    )
