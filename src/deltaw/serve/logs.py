"""Logs on standard error: a line for people, or a JSON object a line."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import TextIO

_PLAIN = re.compile(r"[!-~]*")


def _plain(value: object) -> str:
    """A value that cannot break a line or look like another: a path may hold any character."""
    text = str(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(text)


class Lines(logging.Formatter):
    """Time, level, message, and what a request tells as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        told = getattr(record, "told", {})
        text = " ".join([record.getMessage(), *(f"{k}={_plain(v)}" for k, v in told.items())])
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{_when(record)} {record.levelname.lower()} {text}"


class JsonLines(logging.Formatter):
    """The same as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """One record."""
        body = {"time": _when(record), "level": record.levelname.lower(), "event": record.getMessage()}
        body |= getattr(record, "told", {})
        if record.exc_info:
            body["exception"] = self.formatException(record.exc_info)
        return json.dumps(body, default=str)


def _when(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def set_up_logs(as_json: bool, stream: TextIO | None = None) -> None:
    """Send the logs of the server and of uvicorn to `stream` (standard error); no line goes anywhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if as_json else Lines())
    for name, level in (("deltaw.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(level)
