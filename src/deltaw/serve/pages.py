"""Keys and values of every running sequence, in pages of a few tokens, counted in bytes.

A sequence has a table of pages: its position p stands in page table[p // PAGE_TOKENS], at p % PAGE_TOKENS. A full page
never changes again, so sequences that begin alike share it. What "alike" means is a digest over the adapter's content
and the token ids from the start of the sequence to the end of the page: never a name, so an adapter loaded again under
an old name cannot read pages of the one before. (The paging is PagedAttention's, Kwon et al. 2023, arXiv 2309.06180.)
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PAGE_TOKENS = 16


def digest(before: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page: of the page before it (or the adapter's content) and its own PAGE_TOKENS tokens."""
    return hashlib.sha256(before + b"|" + array("q", tokens).tobytes()).digest()


class Pages:
    """All pages of one engine.

    keys, values  per layer [n_pages, PAGE_TOKENS, kv_heads, head_dim], contiguous, in the base's dtype
    page_bytes    of one page in all layers
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int, int]], n_bytes: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Room for as many pages as `n_bytes` hold (perhaps none). shapes: (kv_heads, key dim, value dim) by layer."""
        self.page_bytes = sum(h * (k + v) for h, k, v in shapes) * PAGE_TOKENS * dtype.itemsize
        self.n_pages = n_bytes // self.page_bytes
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.keys = [torch.zeros(self.n_pages, PAGE_TOKENS, h, k, **like) for h, k, _ in shapes]
        self.values = [torch.zeros(self.n_pages, PAGE_TOKENS, h, v, **like) for h, _, v in shapes]
        self._uses = [0] * self.n_pages
        self._free = list(range(self.n_pages - 1, -1, -1))
        self._known: dict[bytes, int] = {}  # digest -> page that holds it, in use or idle
        self._digest: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known pages that nobody uses, the longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def n_used(self) -> int:
        """Pages that sequences hold; a shared one counts once."""
        return self.n_pages - self.available

    def take(self, n: int) -> list[int] | None:
        """n pages for one user, forgetting prefixes that were unused longest; None (and nothing done) if too few."""
        if n > self.available:
            return None
        taken = []
        for _ in range(n):
            page = self._free.pop() if self._free else self._forget()
            self._uses[page] = 1
            taken.append(page)
        return taken

    def _forget(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._known[self._digest.pop(page)]
        return page

    def share(self, digests: Sequence[bytes]) -> list[int]:
        """The pages of the longest known beginning of `digests`, each with one user more."""
        found = []
        for name in digests:
            if (page := self._known.get(name)) is None:
                break
            self._idle.pop(page, None)
            self._uses[page] += 1
            found.append(page)
        return found

    def publish(self, page: int, name: bytes) -> None:
        """Let a full, computed page be found by its digest. One that is known already stays the one that is found."""
        if name not in self._known and page not in self._digest:
            self._known[name] = page
            self._digest[page] = name

    def release(self, pages: Sequence[int]) -> None:
        """One user less of each page. Known pages without users stay findable until their room is needed."""
        for page in reversed(pages):  # the end of a sequence is forgotten before its beginning
            self._uses[page] -= 1
            if self._uses[page] == 0:
                if page in self._digest:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [n, kv_heads, dim] at `slots` [n] = page * PAGE_TOKENS + place in the page."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, keys)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, values)
