"""A gate before a promotion: a command that measures adapters, and what its values must hold."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import RegistryError, WorkFailed

PLACE = "{adapter}"


@dataclass(frozen=True)
class Measured:
    """What a gate found. `against_value` is None where the label was on no version."""

    command: str
    value: float
    against_value: float | None
    min_gain: float | None
    min_value: float | None
    passed: bool


@dataclass(frozen=True)
class Gate:
    """A command and what must hold. Higher values are better.

    command    an argument vector as a shell would split it (no shell runs it); {adapter} stands for the folder. The
               last JSON object on its standard output has "value", as `deltaw eval --json` prints it
    min_gain   least value of the version minus that of the one the label is on; not asked where it is on none
    min_value  least value of the version
    """

    command: str
    min_gain: float | None = None
    min_value: float | None = None

    def __post_init__(self) -> None:
        """Raises RegistryError for a command without {adapter}, one that cannot be split, or nothing that must hold."""
        if not any(PLACE in word for word in self.argv(PLACE)):
            raise RegistryError(f"The gate's command has no {PLACE}, so it would measure the same thing twice.")
        if self.min_gain is None and self.min_value is None:
            raise RegistryError("A gate needs what must hold: --gate-min-gain, --gate-min-value or both.")
        for limit in (self.min_gain, self.min_value):
            if limit is not None and not math.isfinite(limit):
                raise RegistryError(f"A gate's limit is a finite number, not {limit}.")

    def argv(self, adapter: str) -> list[str]:
        """The command's words for one adapter's folder. Raises RegistryError when it cannot be split."""
        try:
            return [word.replace(PLACE, adapter) for word in shlex.split(self.command)]
        except ValueError as problem:
            raise RegistryError(f"The gate's command cannot be split into words: {problem}.") from None

    def measure(self, folder: Path, against: Path | None) -> Measured:
        """Run the command for a version, and for the one that it would follow. Raises WorkFailed, RegistryError."""
        value = self._value(folder)
        old = None if against is None else self._value(against)
        gains = self.min_gain is None or old is None or value - old >= self.min_gain
        is_enough = self.min_value is None or value >= self.min_value
        return Measured(self.command, value, old, self.min_gain, self.min_value, gains and is_enough)

    def demand(self, told: Measured, name: str, against: str | None) -> None:
        """Raise WorkFailed, with the values, unless the gate was passed."""
        if told.passed:
            return
        asked = [
            *([] if told.min_gain is None else [f"a gain of at least {told.min_gain:g}"]),
            *([] if told.min_value is None else [f"a value of at least {told.min_value:g}"]),
        ]
        other = "" if against is None else f", {against} {told.against_value:g}"
        raise WorkFailed(f"The gate is not passed: {name} has {told.value:g}{other}; asked was {' and '.join(asked)}.")

    def _value(self, folder: Path) -> float:
        argv = self.argv(str(folder))
        try:
            done = subprocess.run(argv, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
        except (FileNotFoundError, PermissionError, NotADirectoryError) as problem:
            raise RegistryError(f"The gate's command {argv[0]!r} cannot be run: {problem.strerror}.") from None
        if done.returncode:
            raise WorkFailed(f"The gate's command ended with {done.returncode} for {folder}: {shlex.join(argv)}")
        value = last_object(done.stdout.decode(errors="replace")).get("value")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise WorkFailed(
                f'The gate\'s command printed no JSON object with a finite "value" last (found {value!r}): '
                f"{shlex.join(argv)}"
            )
        return float(value)


def last_object(text: str) -> dict[str, Any]:
    """The last JSON object in a text that stands on lines of its own; {} when there is none."""
    lines = text.splitlines()
    for first in range(len(lines) - 1, -1, -1):
        if lines[first].startswith("{"):
            for last in range(len(lines), first, -1):
                try:
                    found = json.loads("\n".join(lines[first:last]))
                except ValueError:
                    continue
                if isinstance(found, dict):
                    return found
    return {}
