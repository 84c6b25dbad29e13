"""Rows: what a line of a JSON Lines file, a data set or a list in memory says, checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.data import hub
from deltaw.errors import DataError, near

SHAPES = (("prompt", "completion"), ("messages",), ("text",))
IN_MEMORY = "rows"


@dataclass(frozen=True)
class Row:
    """One row in one of three shapes: prompt and completion, messages, or text; the other fields are None.

    choices  the answers to choose from, where a prompt/completion row brings its own (metric "choice")
    tools    the functions that a chat may call, where a row of messages brings them; the chat template writes them
    source   the file or data set as it was named; "rows" for rows given in memory
    line     counted from 1, blank lines included; for data sets and rows in memory the index + 1
    """

    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    choices: tuple[str, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    source: str = IN_MEMORY
    line: int = 1

    @property
    def where(self) -> str:
        """Like "train.jsonl line 412"."""
        return f"{self.source} line {self.line}"


def read_rows(source: str | Path | Iterable[Mapping[str, Any]]) -> list[Row]:
    """The rows of a source, in order.

    source   the path of a JSON Lines file (UTF-8; blank lines are skipped), "hf:<dataset>[:split]" or a
             .parquet, .csv or .json file (both through `datasets`), or rows in memory. Keys that no shape
             names are ignored

    Raises DataError, with source and line, for: a missing or unreadable file, bytes that are not UTF-8, bad
    JSON, a line that is not an object, a missing or wrong-typed field, a row of no shape or of two, and no
    rows at all.
    """
    if isinstance(source, str | Path):
        name = str(source)
        records = enumerate(hub.read_dataset(name), start=1) if hub.reads(name) else _read_lines(Path(source))
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(
            f"rows must be a path or a list of objects, found {type(source).__name__}.\n"
            '  Give rows as in [{"prompt": "...", "completion": "..."}, ...].'
        )
    else:
        name, records = IN_MEMORY, enumerate(source, start=1)
    rows = [_row(record, name, line) for line, record in records]
    if not rows:
        raise DataError(f"{name} has no rows: it is empty.\n  Give at least one row, one JSON object a line.")
    return rows


def data_hash(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) of what the rows say, in their order; where they came from does not count."""
    digest = hashlib.sha256()
    for row in rows:
        keys = [*(key for shape in SHAPES for key in shape), "choices", "tools"]
        fields = {key: value for key in keys if (value := getattr(row, key)) is not None}
        digest.update(json.dumps(fields, sort_keys=True, separators=(",", ":"), default=str).encode("ascii"))
        digest.update(b"\n")
    return digest.hexdigest()


def _read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Each line that is not blank, parsed, with its number."""
    try:
        path = path.expanduser()
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(
            f"the data file {str(path)!r} does not exist.{near(path.name, names)}\n"
            f"  A relative path is looked up from {str(Path.cwd())!r}."
        ) from error
    except (OSError, ValueError, RuntimeError) as error:  # a name that cannot be, or an unknown user's folder
        raise DataError(
            f"the data file {str(path)[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}.\n"
            "  Give the path of a readable JSON Lines file."
        ) from error
    for number, line in enumerate(lines, start=1):
        text = _decode(line, f"{path} line {number}", first=number == 1)
        if text.strip():
            yield number, _parse(text, f"{path} line {number}")


def _decode(line: bytes, where: str, *, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")  # editors on Windows begin a file with a mark
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8: 0x{line[error.start]:02x} at byte {error.start + 1} ({error.reason}).\n"
            "  Save the file as UTF-8."
        ) from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        around = text[max(error.pos - 20, 0) : error.pos + 20].strip()
        raise DataError(
            f"{where}: bad JSON: {error.msg} at column {error.pos + 1}, near {around!r}.\n"
            "  Each line must be one JSON object."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: bad JSON: {error}.\n  Each line must be one JSON object.") from error


def _row(record: Any, source: str, line: int) -> Row:
    """The record as a Row, or DataError."""
    where = f"{source} line {line}"
    if not isinstance(record, Mapping):
        raise DataError(
            f"{where}: a row must be an object, found {_shown(record)}.\n"
            '  Write it as {"prompt": "...", "completion": "..."}, {"messages": [...]} or {"text": "..."}.'
        )
    # a table with several shapes has null where a row lacks a field
    shapes = [shape for shape in SHAPES if all(record.get(key) is not None for key in shape)]
    if len(shapes) > 1:
        raise DataError(
            f"{where}: the row has more than one shape: {' and '.join(_named(shape) for shape in shapes)}.\n"
            "  Keep one of them."
        )
    if not shapes:
        raise DataError(f"{where}: {_what_is_missing(record)}")
    if shapes[0] == ("messages",):
        messages, tools = _messages(record["messages"], where), _tools(record.get("tools"), where)
        return Row(messages=messages, tools=tools, source=source, line=line)
    texts: dict[str, Any] = {key: _text(record[key], f"field {key!r}", where) for key in shapes[0]}
    choices = record.get("choices") if "prompt" in texts else None
    if not (isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)):
        choices = None  # another tool's field of the same name
    return Row(**texts, choices=None if choices is None else tuple(choices), source=source, line=line)


def _what_is_missing(record: Mapping[str, Any]) -> str:
    """A message for a record without a whole shape."""
    keys = [str(key) for key in record]
    found = f"The row has {_named(keys) if keys else 'no fields'}."
    half = [key for key in SHAPES[0] if record.get(key) is not None]
    if half:
        absent = "completion" if half == ["prompt"] else "prompt"
        state = "is null" if absent in record else "is missing"
        return (
            f"field {absent!r} {state}.\n  {found}{near(absent, [key for key in keys if key not in (*half, absent)])}"
        )
    fields = [key for shape in SHAPES for key in shape]
    hints = [f"{hint.strip()} (for {key!r})" for key in fields if (hint := near(key, keys, cutoff=0.7))]
    nulls = "".join(f" ({key!r} is null)" for key in fields if key in record)
    return f"no 'prompt' and 'completion', no 'messages', no 'text'{nulls}.\n  {' '.join([found, *hints])}"


def _messages(messages: Any, where: str) -> list[dict[str, Any]]:
    """The messages as plain dicts, each with a role, and a content unless it calls tools."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence) or not messages:
        raise DataError(
            f"{where}: field 'messages' must be a list of turns, found {_shown(messages)}.\n"
            '  Write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        )
    turns = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}: {place} must be an object, found {_shown(message)}.\n"
                '  Write it as {"role": "user", "content": "..."}.'
            )
        turn = {key: value for key, value in message.items() if value is not None}
        for key in ("role", "content"):
            if key in turn:
                _text(turn[key], f"{place}[{key!r}]", where)
            elif key == "role" or "tool_calls" not in turn:
                raise DataError(
                    f"{where}: {place} has no {key!r}.\n  It has {_named(turn) if turn else 'no fields'}."
                    f"{near(key, [name for name in turn if name != 'role'])}"
                )
        turns.append(turn)
    return turns


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """The functions that a chat may call; tables keep them as JSON in a text. None where there are none."""
    found = _parse(tools, f"{where}: field 'tools'") if isinstance(tools, str) and tools else tools
    if not found:
        return None
    if not isinstance(found, list | tuple) or not all(isinstance(tool, Mapping) for tool in found):
        raise DataError(
            f"{where}: field 'tools' must be a list of objects, found {_shown(tools)}.\n"
            '  Write it as [{"type": "function", "function": {"name": "..."}}], or leave it out.'
        )
    return [dict(tool) for tool in found]


def _text(value: Any, what: str, where: str) -> str:
    """The value if it is text that can be encoded, or DataError."""
    if not isinstance(value, str):
        hint = "Write it as text in quotes"
        if isinstance(value, list | tuple):
            hint = "Write it as one text; turns of a chat go into 'messages'"
        raise DataError(f"{where}: {what} must be text, found {_shown(value)}.\n  {hint}.")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: {what} holds a lone surrogate, {value[error.start]!r}, at index {error.start}.\n"
                "  Write the character whole, or remove it."
            ) from error
    return value


def _named(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _shown(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
