"""Activation checkpointing: blocks keep their input only and are computed again in the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


class _Kept(torch.autograd.Function):
    """x, copied to a place of its own; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        return place.copy_(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class _Inputs:
    """The inputs of all blocks, kept in one buffer.

    Each where it was made, they would lie between what the blocks allocate and free, and the heap could never join
    the free pieces again: on 32 blocks that was more than twice the memory in use.
    """

    def __init__(self, n_blocks: int) -> None:
        self._n = n_blocks
        self._buffer: Tensor | None = None
        self._used = 0

    def keep(self, x: Tensor) -> Tensor:
        """x in the next place, or x itself where it has another shape than the first."""
        if self._buffer is None:
            self._buffer = x.new_empty(self._n, *x.shape)
        if self._used == self._n or x.shape != self._buffer.shape[1:] or x.dtype != self._buffer.dtype:
            return x
        place = self._buffer.data[self._used]  # .data: writing the next place must not count as changing this one
        self._used += 1
        kept: Tensor = _Kept.apply(x, place)
        return kept


def _recomputed(forward: Callable[..., Any], inputs: _Inputs, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    hidden = inputs.keep(hidden) if isinstance(hidden, Tensor) else hidden
    return checkpoint(forward, hidden, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


@contextmanager
def recomputed_blocks(net: nn.Module, room_for: int | None = None) -> Iterator[None]:
    """Inside, every block of `net` keeps only its input and is computed again in the backward. For one forward.

    room_for  inputs that the buffer has room for; None: one of each block
    """
    blocks = [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]
    inputs = _Inputs(room_for or len(blocks))
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, inputs)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
