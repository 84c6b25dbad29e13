"""How an optimizer's states are laid out: what they are, in which pages, and what memory they take.

It is arithmetic on shapes, so that a plan gives what the optimizer then takes, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltaw.errors import RecipeError
from deltaw.train.optim.adamw import Rule
from deltaw.train.optim.pages import PAGE, Kind, Page, Shape, choose_pages, cut, page_bytes, spans
from deltaw.train.optim.workers import MOST

_WHOLE = 1 << 62


@dataclass(frozen=True)
class Layout:
    """The states of parameters that have numbers.

    kinds          of each parameter
    stay           the pages that stay in memory while the rest is in a file; None: all do, and there is no file
    n_workers      threads that update pages; 0: the caller's own
    scratch_bytes  what updates hold beside pages, in all threads; counted where there is a file
    """

    kinds: Sequence[tuple[Kind, ...]]
    pages: Sequence[Page]
    stay: frozenset[int] | None
    n_workers: int
    scratch_bytes: int

    @property
    def states_bytes(self) -> int:
        """Of all states, in memory or not."""
        return sum(kind.n_bytes for of_one in self.kinds for kind in of_one)

    @property
    def resident_bytes(self) -> int:
        """Of states in memory, and of buffers and scratch for pages where they are paged."""
        if self.stay is None:
            return self.states_bytes
        sizes = [page_bytes(spans(page, self.kinds)) for page in self.pages]
        return max(1, self.n_workers) * max(sizes) + sum(sizes[i] for i in self.stay) + self.scratch_bytes


def lay_out(
    groups: Sequence[Sequence[Shape]], rule: Rule, *, paged: bool, resident_mb: float | None, threads: int
) -> Layout:
    """The layout of the states of `groups`' parameters, numbered through; no page holds parameters of two groups.

    Raises RecipeError for a budget too small, and for pages of parameters that are not on the CPU.
    """
    shapes = [of for group in groups for of in group]
    on_cpu = all(of.device == "cpu" for of in shapes)
    if paged and not on_cpu:
        raise RecipeError(
            "train.optimizer.paged is for parameters on the CPU. Remove it: on another device states stay there."
        )
    kinds = [rule.kinds(of) for of in shapes]
    whole = {i for i, of in enumerate(shapes) if rule.takes_whole(of)}
    ends = [sum(len(g) for g in groups[: i + 1]) for i in range(len(groups))]
    numbers = [range(end - len(group), end) for end, group in zip(ends, groups, strict=True)]

    def cut_to(most: int) -> list[Page]:
        return [page for of_group in numbers for page in cut([(i, shapes[i].n) for i in of_group], most, whole)]

    threads = min(threads, MOST)
    # threads of ours make OpenMP's sleep between operations, everywhere in the process: only where they gain more
    n_workers = threads + 1 if paged else threads if on_cpu and threads > 1 and whole else 0
    budget = None if resident_mb is None else resident_mb * 1e6
    chosen = choose_pages(cut_to, kinds, budget, n_workers, rule.scratch_bytes) if paged else None
    if chosen is None:
        return Layout(kinds, cut_to(PAGE if n_workers else _WHOLE), None, n_workers, 0)
    pages, stay = chosen
    largest = max((stop - start for page in pages for i, start, stop in page if i not in whole), default=0)
    return Layout(kinds, pages, frozenset(stay), n_workers, n_workers * rule.scratch_bytes(largest))
