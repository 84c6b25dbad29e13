"""What a call of the program left: exit code, stdout, stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ended:
    """How a call of the program ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object that is all of stdout."""
        return json.loads(self.out)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Call = Callable[..., Ended]


def refused(ended: Ended, kind: str, *said: str, code: int = 2) -> None:
    """One message on stderr, under its class's name; nothing on stdout."""
    assert (ended.code, ended.out) == (code, ""), ended
    assert ended.err.startswith(f"{kind}: "), ended.err
    assert "Traceback" not in ended.err
    for part in said:
        assert part in ended.err
