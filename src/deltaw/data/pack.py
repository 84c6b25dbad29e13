"""Documents one after the other without padding: which go into a step, and the tensors of a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from deltaw.data.template import Example
from deltaw.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Packed documents; every tensor is int64.

    input_ids    [T]      tokens of all documents, one document after the other
    positions    [T]      position of each token in its document, from 0
    bounds       [D + 1]  document d is [bounds[d], bounds[d + 1]); always on the CPU
    predict_at   [n]      row i predicts target_ids[i]: the place in `input_ids` just before the target
    target_ids   [n]
    fronts       [D]      the document that each goes on from, -1 for none; None: no document does. On the CPU
    """

    input_ids: Tensor
    positions: Tensor
    bounds: Tensor
    predict_at: Tensor
    target_ids: Tensor
    fronts: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch with its tokens and targets on `device`; itself where they are there, or to be traced (meta)."""
        if self.input_ids.device == device or device.type == "meta":
            return self
        ids, positions = self.input_ids.to(device), self.positions.to(device)
        at, targets = self.predict_at.to(device), self.target_ids.to(device)
        return Batch(ids, positions, self.bounds, at, targets, self.fronts)

    @property
    def n_tokens(self) -> int:
        """T: tokens of all documents."""
        return self.input_ids.numel()

    @property
    def n_targets(self) -> int:
        """n: tokens to be predicted."""
        return self.target_ids.numel()

    @property
    def n_docs(self) -> int:
        """D: documents."""
        return self.bounds.numel() - 1


def collate(examples: Sequence[Example]) -> Batch:
    """The examples, in their order, as one batch."""
    assert examples, "a batch has at least one document"
    lengths = [len(example.input_ids) for example in examples]
    input_ids = _long(chain.from_iterable(example.input_ids for example in examples))
    # a document's first token is never a target, so the place before a target is in the same document
    targets = _long(chain.from_iterable(example.is_target for example in examples)).nonzero().flatten()
    return Batch(
        input_ids=input_ids,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        bounds=_long(accumulate(lengths, initial=0)),
        predict_at=targets - 1,
        target_ids=input_ids[targets],
    )


def plan_epoch(
    lengths: Sequence[int], tokens_per_step: int, *, seed: int, epoch: int, shuffle: bool = True
) -> list[list[int]]:
    """Which examples go into each optimizer step of an epoch: every index once.

    lengths           tokens of each example
    tokens_per_step   examples fill a step, in shuffled order, until the next would go beyond it; an example
                      that is longer by itself gets a step of its own, and the last step may be small
    seed, epoch       the order depends on these two and the number of examples alone

    Raises DataError if `tokens_per_step` is not positive.
    """
    order = list(range(len(lengths)))
    if shuffle:
        mixed = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8]  # near seeds, far streams
        generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big") >> 1)
        order = torch.randperm(len(lengths), generator=generator).tolist()
    return _fill(order, lengths, tokens_per_step, "tokens_per_step")


def split_micro(indices: Sequence[int], lengths: Sequence[int], micro_tokens: int | None) -> list[list[int]]:
    """One step's examples in micro-batches, those of like length together (a stable sort by length).

    indices        of the step's examples
    lengths        tokens of every example of the epoch, not of the step's alone
    micro_tokens   most tokens of a micro-batch (an example that is longer is one by itself); None: one for
                   all

    Raises DataError if `micro_tokens` is not positive.
    """
    order = sorted(indices, key=lambda index: lengths[index])
    if micro_tokens is None:
        return [order] if order else []
    return _fill(order, lengths, micro_tokens, "micro_tokens")


def _fill(order: Iterable[int], lengths: Sequence[int], limit: int, what: str) -> list[list[int]]:
    """The order cut into runs of at most `limit` tokens, or of one example."""
    if limit < 1:
        raise DataError(f"{what} must be at least 1, found {limit}.\n  Give the tokens that fit at a time, like 2048.")
    runs: list[list[int]] = []
    filled = 0
    for index in order:
        if not runs or filled + lengths[index] > limit:
            runs.append([])
            filled = 0
        runs[-1].append(index)
        filled += lengths[index]
    return runs


def _long(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
