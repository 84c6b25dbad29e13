"""What a row becomes for a base that is no causal language model: a source with an answer, or a text with a label."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deltaw.data.source import Row
from deltaw.data.spec import DataSpec
from deltaw.errors import DataError, near

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["causal", "seq2seq", "classify"]


@dataclass(frozen=True)
class Task:
    """What a base computes.

    kind    "causal": goes on with a text; "seq2seq": reads a prompt with an encoder and answers with a decoder;
            "classify": gives a text one of `labels`
    """

    kind: Kind = "causal"
    labels: tuple[str, ...] = ()


CAUSAL = Task()


@dataclass(frozen=True)
class Side:
    """Tokens of one of the two texts: the tokenizer's own in front and at the end, and the text's between them."""

    front: list[int] = field(default_factory=list)
    body: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [*self.front, *self.body, *self.end]

    def cut(self, limit: int) -> list[int]:
        """At most `limit`, the end kept, as tokenizers truncate."""
        room = max(limit - len(self.front) - len(self.end), 0)
        return [*self.front, *self.body[:room], *self.end][:limit]


def sides(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, task: Task) -> tuple[Side, Side]:
    """What the encoder reads, and what is learned: the answer's tokens, or the label's number as a single one.

    Raises DataError for a row without prompt and completion, a label that does not exist, or a chat template.
    """
    source = source_side(row, tokenizer, spec, task)
    if row.completion is None:
        raise DataError(f"{row.where}: {_needs_two(task)}")
    if task.kind == "classify":
        return source, Side(body=[label_number(row, task.labels)])
    answer = _tokens(tokenizer, row.completion, "text_target")
    if not spec.append_end:
        return source, Side(answer.front, answer.body)
    if not answer.end:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{row.where}: an end token is to be appended, and this tokenizer has none (eos_token).\n"
                "  Set the tokenizer's eos_token, or data.append_end=false (generation will then not stop)."
            )
        answer = Side(answer.front, answer.body, [int(tokenizer.eos_token_id)])
    return source, answer


def source_side(row: Row, tokenizer: PreTrainedTokenizerBase, spec: DataSpec, task: Task) -> Side:
    """What the encoder reads of a row: its prompt, with the tokenizer's own tokens around it. Raises DataError."""
    if spec.template == "chat":
        raise DataError(f"{row.where}: a chat template is for causal language models; set data.template=plain.")
    if row.prompt is None:
        raise DataError(f"{row.where}: {_needs_two(task)}")
    found = _tokens(tokenizer, row.prompt, "text")
    if not found.ids:
        raise DataError(f"{row.where}: the prompt is empty: the encoder has nothing to read.\n  Remove the row.")
    return found


def label_number(row: Row, labels: Sequence[str]) -> int:
    """The number of a row's completion among `labels`, spaces around it aside. Raises DataError."""
    known, given = [label.strip() for label in labels], (row.completion or "").strip()
    if given not in known:
        more = f" and {len(known) - 12} more" if len(known) > 12 else ""
        raise DataError(
            f"{row.where}: completion {row.completion!r} is none of the {len(known)} labels.{near(given, known)}\n"
            f"  They are: {', '.join(known[:12])}{more}."
        )
    return known.index(given)


def read_labels(source: str | Path | Sequence[str]) -> list[str]:
    """The labels of a classification: a list of distinct strings, or a JSON file that holds one."""
    if isinstance(source, str | Path):
        try:
            labels = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{source} cannot be read as JSON: {error}") from None
    else:
        labels = list(source)
    where = source if isinstance(source, str | Path) else "the labels"
    if not isinstance(labels, list) or len(labels) < 2 or not all(isinstance(x, str) and x.strip() for x in labels):
        raise DataError(f"{where} must hold a list of at least two strings.")
    if len({label.strip() for label in labels}) != len(labels):
        raise DataError(f"{where} holds a label twice.")
    return labels


def given_labels(spec: DataSpec) -> list[str] | None:
    """The labels that a recipe's `data:` names; None: those of the base. Raises DataError."""
    return None if spec.labels is None else read_labels(spec.labels)


def _needs_two(task: Task) -> str:
    if task.kind == "classify":
        return "an encoder that classifies needs rows of prompt (the text) and completion (its label)."
    return "an encoder-decoder needs rows of prompt and completion."


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, argument: str) -> Side:
    """One text as the tokenizer writes it by itself; `argument` is its name there: "text" or "text_target"."""
    settings: dict[str, Any] = {"return_special_tokens_mask": True, "return_attention_mask": False, "verbose": False}
    out = tokenizer(**{argument: text}, **settings)
    ids, added = list(out["input_ids"]), list(out["special_tokens_mask"])
    if all(added):  # an empty text: which of the tokens stand in front is seen with a word between them
        probe = tokenizer(**{argument: "a"}, **settings)["special_tokens_mask"]
        n_front = next((i for i, flag in enumerate(probe) if not flag), len(ids))
        return Side(ids[:n_front], [], ids[n_front:])
    begin = next(i for i, flag in enumerate(added) if not flag)
    end = next(i + 1 for i in range(len(ids) - 1, -1, -1) if not added[i])
    return Side(ids[:begin], ids[begin:end], ids[end:])
