"""Activation checkpointing: blocks keep their input only and are computed again in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def recomputed_blocks(net: nn.Module) -> Iterator[None]:
    """Inside, every block of `net` keeps only its input and is computed again in the backward."""
    blocks = [m for m in net.modules() if isinstance(m, GradientCheckpointingLayer)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
