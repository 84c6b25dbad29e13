"""Optimizer states cut into pages: which elements, how many bytes, and what a budget holds of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from deltaw.errors import RecipeError

PAGE = 1 << 18
"""Elements of a page at most: 2 MB of AdamW's states, which a core's cache can hold."""

SMALLEST_PAGE = 4096
_CUT = 256  # pages begin at multiples of it within a parameter: whole blocks of 8-bit states, whole vectors


@dataclass(frozen=True)
class Shape:
    """What is known of a parameter before there is one.

    device   the kind of device it is on when it is trained: "cpu", "cuda"
    """

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: str

    @classmethod
    def of(cls, name: str, tensor: Tensor, device: str | None = None) -> Shape:
        """That of a tensor, which may be trained on another device than it is on now."""
        return cls(name, tuple(tensor.shape), tensor.dtype, device or tensor.device.type)

    @property
    def n(self) -> int:
        """Its elements."""
        return math.prod(self.sizes)


@dataclass(frozen=True)
class Kind:
    """One flat state of a parameter.

    size   elements of the state
    per    elements of the parameter that share one element of the state; None: it belongs to the parameter as a whole,
           which is never cut
    """

    name: str
    dtype: torch.dtype
    size: int
    per: int | None = 1

    def part(self, start: int, stop: int) -> tuple[int, int]:
        """The state's elements for the parameter's elements start .. stop."""
        return (0, self.size) if self.per is None else (start // self.per, -(-stop // self.per))

    @property
    def n_bytes(self) -> int:
        return self.size * self.dtype.itemsize


class Segment(NamedTuple):
    """Elements start .. stop of the flat parameter number `parameter`."""

    parameter: int
    start: int
    stop: int


Page = tuple[Segment, ...]


def cut(sizes: Sequence[tuple[int, int]], most: int, whole: Collection[int] = ()) -> list[Page]:
    """Pages of at most `most` elements over parameters given as (number, elements), in their order.

    `most` is a multiple of 256. A parameter is cut at multiples of 256 only, small ones share a page; each of the
    numbers in `whole` is a page by itself, however large.
    """
    pages: list[Page] = []
    page: list[Segment] = []
    room = most
    for parameter, n in sizes:
        start = 0
        if parameter in whole:
            pages += [tuple(page)] if page else []
            pages.append((Segment(parameter, 0, n),))
            page, room, start = [], most, n
        while start < n:
            stop = n if n - start <= room else start + room // _CUT * _CUT
            if stop > start:
                page.append(Segment(parameter, start, stop))
                room -= stop - start
                start = stop
            if start < n:
                pages.append(tuple(page))
                page, room = [], most
    return [*pages, tuple(page)] if page else pages


class Span(NamedTuple):
    """The bytes of one state of one of a page's segments.

    segment      its place in the page
    at, stop     its bytes in the page's buffer
    first        the first element of the state of parameter number `parameter`
    """

    segment: int
    kind: Kind
    at: int
    stop: int
    parameter: int
    first: int


def spans(page: Page, kinds: Sequence[tuple[Kind, ...]]) -> list[Span]:
    """What a page's buffer holds, one after the other, each aligned to 64 bytes."""
    found: list[Span] = []
    at = 0
    for place, (parameter, start, stop) in enumerate(page):
        for kind in kinds[parameter]:
            first, end = kind.part(start, stop)
            found.append(Span(place, kind, at, at + (end - first) * kind.dtype.itemsize, parameter, first))
            at = aligned(found[-1].stop)
    return found


def aligned(n_bytes: int) -> int:
    """`n_bytes`, or the next multiple of 64."""
    return -(-n_bytes // 64) * 64


def page_bytes(of_page: Sequence[Span]) -> int:
    """The size of a page's buffer."""
    return aligned(of_page[-1].stop)


def choose_pages(
    cut_to: Callable[[int], list[Page]],
    kinds: Sequence[tuple[Kind, ...]],
    budget_bytes: float | None,
    n_slots: int,
    scratch_bytes: Callable[[int], int],
) -> tuple[list[Page], set[int]] | None:
    """The pages, and which of them always stay, under a budget for everything held; None when it holds all states.

    cut_to         pages of at most so many elements
    budget_bytes   None: a quarter of the states, or the smallest that works where that is more
    n_slots        pages that are worked on at a time, each with a buffer and with `scratch_bytes` of its size

    Buffers get a third of the budget at most, unless the smallest pages need more. Raises RecipeError when those do not
    fit the budget.
    """
    total = sum(kind.n_bytes for of_one in kinds for kind in of_one)
    budget = total / 4 if budget_bytes is None else budget_bytes
    if budget >= total:
        return None
    most = PAGE
    pages, sizes, held = _held(cut_to, kinds, most, n_slots, scratch_bytes)
    while most > SMALLEST_PAGE and held > budget / 3:
        most //= 2
        smaller = _held(cut_to, kinds, most, n_slots, scratch_bytes)
        if smaller[2] < held:  # not where a parameter that is never cut needs the most
            pages, sizes, held = smaller
    if held > budget and budget_bytes is not None:
        raise RecipeError(
            f"train.optimizer.resident_mb is {budget / 1e6:g}, and the buffers of {n_slots} pages need "
            f"{-(-held // 1000) / 1000:g}. Raise it to at least that; all states are {total / 1e6:.3f} MB."
        )
    return (pages, _pinned(sizes, budget - held)) if held < total else None


def _held(
    cut_to: Callable[[int], list[Page]],
    kinds: Sequence[tuple[Kind, ...]],
    most: int,
    n_slots: int,
    scratch_bytes: Callable[[int], int],
) -> tuple[list[Page], list[int], int]:
    """Pages of at most `most` elements, their sizes in bytes, and the bytes of all buffers."""
    pages = cut_to(most)
    sizes = [page_bytes(spans(page, kinds)) for page in pages]
    return pages, sizes, n_slots * (max(sizes) + scratch_bytes(most))


def _pinned(sizes: Sequence[int], room: float) -> set[int]:
    """The smallest pages first (they cost as many calls as large ones), then those that come first."""
    chosen: set[int] = set()
    for number in sorted(range(len(sizes)), key=lambda i: (sizes[i], i)):
        if sizes[number] > room:
            break
        room -= sizes[number]
        chosen.add(number)
    return chosen
