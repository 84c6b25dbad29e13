"""Shifted sparse attention over packs (LongLoRA, arXiv:2309.12307, section 3.2), inside each document."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from deltaw.core.spec import Groups
from deltaw.model.attention import Documents

Cut = Callable[[int], Groups | None]


def shifted_documents(
    bounds: Tensor, cut: Cut, device: torch.device | None = None
) -> tuple[Documents, Documents] | None:
    """A pack's documents cut into groups, and into groups moved by half of one; None where none is cut.

    bounds  [D + 1] of the documents, whose tokens are on `device`;  cut: a document's length -> its groups
    """
    plain: list[int] = [0]
    moved: list[int] = [0]
    is_cut = False
    for start, end in itertools.pairwise(bounds.tolist()):
        found = cut(end - start)
        if found is not None:
            is_cut = True
            plain += range(start + found.size, end, found.size)
            moved += range(start + found.shift, end, found.size)
        plain.append(end)
        moved.append(end)
    if not is_cut:
        return None
    return Documents.of(torch.tensor(plain, dtype=torch.long), device), Documents.of(
        torch.tensor(moved, dtype=torch.long), device
    )
