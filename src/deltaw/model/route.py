"""Which adapter each row of a serving step wears."""

from __future__ import annotations

from dataclasses import dataclass

Segments = tuple[tuple[int, int, str | None], ...]


@dataclass(frozen=True)
class Route:
    """Runs of rows (start, stop, adapter or None), in order and without gaps.

    rows  of every row of the step
    head  of the rows whose logits are wanted, as the head sees them: a choice of all rows, in their order
    """

    rows: Segments
    head: Segments

    def at(self, n: int) -> Segments:
        """Of a module that sees n rows: all of them, or else the wanted ones (all wanted: both are the same)."""
        return self.rows if n == self.rows[-1][1] else self.head
