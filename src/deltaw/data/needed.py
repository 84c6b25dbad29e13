"""The rows of a pack that its targets depend on, each of them once.

In a causal network a token depends on those before it in its document alone. So nothing depends on what stands behind
a document's last target, and documents that begin alike, as those of one task do (a chat's system message, an
instruction), have the same rows for as long as they are alike. Those are computed once, as a front that the documents
go on from (`ops.attention`); what comes back to them is added up, so loss and gradients are those of the whole pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from deltaw.data.pack import Batch
from deltaw.data.template import Example

LEAST_SHARE = 1 / 64
"""Of a pack's rows that fronts must save, or there are none."""


def needed(batch: Batch, *, fronts: bool = True) -> Batch:
    """The pack with what its targets need: the same targets in the same order, at other places.

    fronts   whether documents may go on from a front. Fronts stand first, each a document without targets. Those before
             a document's first target that `predict_at` names are never among them, so no place predicts twice

    A pack that needs all of its rows once is returned as it is.
    """
    bounds, at = batch.bounds.numpy(), batch.predict_at.numpy()
    first, behind = np.searchsorted(at, bounds[:-1]), np.searchsorted(at, bounds[1:])
    docs = np.flatnonzero(first < behind)
    if not len(docs):
        return batch
    starts, shareable, ends = bounds[docs], at[first[docs]], at[behind[docs] - 1] + 1
    groups: list[tuple[list[int], int]] = []
    if fronts:
        tokens = batch.input_ids.tolist()
        groups = alike([tokens[a:b] for a, b in zip(starts, shareable, strict=True)])
        saved = sum((len(members) - 1) * length for members, length in groups)
        groups = groups if saved >= LEAST_SHARE * batch.n_tokens else []
    if not groups and int((ends - starts).sum()) == batch.n_tokens:
        return batch
    front_of, begins = np.full(len(docs), -1), starts.copy()
    pieces = []
    for number, (members, length) in enumerate(groups):
        pieces.append(np.arange(starts[members[0]], starts[members[0]] + length))
        front_of[members] = number
        begins[members] += length
    pieces += [np.arange(a, b) for a, b in zip(begins, ends, strict=True)]
    rows = np.concatenate(pieces)
    places = np.empty(batch.n_tokens, dtype=np.int64)
    places[rows] = np.arange(len(rows))
    kept = torch.from_numpy(rows)
    return Batch(
        input_ids=batch.input_ids[kept],
        positions=batch.positions[kept],
        bounds=_long(itertools.accumulate((len(p) for p in pieces), initial=0)),
        predict_at=torch.from_numpy(places[at]),
        target_ids=batch.target_ids,
        fronts=_long([-1] * len(groups) + front_of.tolist()) if groups else None,
    )


def alike(heads: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """The groups of heads that save most when what all of a group begin with is written once: [(members, length)].

    A group has two members or more and a length of 1 or more; one of n saves (n - 1) * length. Heads in the order of
    their tokens have their groups side by side, so the best cut of that order is the best of all.
    """
    order = sorted(range(len(heads)), key=lambda i: tuple(heads[i]))
    common = np.array([_common(heads[a], heads[b]) for a, b in itertools.pairwise(order)], dtype=np.int64)
    best, begin = np.zeros(len(order) + 1, dtype=np.int64), [0] * (len(order) + 1)  # of the first j in the order
    for j in range(1, len(order) + 1):
        length = np.minimum.accumulate(common[: j - 1][::-1])[::-1]  # of the group that begins at i and ends before j
        gain = np.append(best[: j - 1] + np.arange(j - 1, 0, -1) * length, best[j - 1])
        begin[j] = int(gain.argmax())
        best[j] = gain[begin[j]]
    groups: list[tuple[list[int], int]] = []
    j = len(order)
    while j > 0:
        i = begin[j]
        if j - i > 1 and (shared := int(common[i : j - 1].min())):
            groups.append((sorted(order[i:j]), shared))
        j = i
    return groups


def common_rows(examples: Sequence[Example]) -> int:
    """The tokens that all examples begin with, none of which predicts a target."""
    heads = [e.input_ids[: max(0, e.is_target.index(True) - 1)] for e in examples if e.n_targets]
    return _common(min(heads), max(heads)) if heads else 0


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _long(values: Sequence[int] | itertools.accumulate[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
