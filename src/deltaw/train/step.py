"""One optimizer step's gradient, and the loss of rows without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deltaw.data.pack import collate, split_micro
from deltaw.data.template import Example
from deltaw.model.attention import packed_attention, packs
from deltaw.model.model import Model
from deltaw.train.loss import Loss

_SEEDS = 2**42  # hosts multiply by a million and add strides of documents


def step_gradient(
    model: Model,
    examples: Sequence[Example],
    loss: Loss,
    *,
    micro_tokens: int | None = None,
    checkpointing: bool = False,
    seed: int = 0,
) -> tuple[float, int, int]:
    """Add one step's gradient to the trainable parameters: (mean loss, tokens, target tokens).

    The sum over target tokens of all micro-batches is divided by their number in the whole step, so the
    result does not depend on how the step is split. `seed` seeds dropout, document by document.
    """
    lengths = [len(e.input_ids) for e in examples]
    n_targets = sum(sum(e.is_target) for e in examples)
    total, n_tokens = 0.0, 0
    try:
        for micro in split_micro(range(len(examples)), lengths, micro_tokens):
            batch = collate([examples[i] for i in micro])
            model.run.seed = seed % _SEEDS
            pack = tuple((i, lengths[i], examples[i].n_targets) for i in micro)
            model.run.pack = pack if packs(model.net) or model.kind != "causal" else None
            model.run.again = checkpointing
            with packed_attention(model.net):  # through the backward, where blocks may be computed again
                part = loss(model, batch) / n_targets
                part.backward()
            total += float(part.detach())
            n_tokens += batch.n_tokens
    finally:
        model.run.seed = model.run.pack = None
        model.run.again = False
    return total, n_tokens, n_targets


@torch.no_grad()
def mean_loss(model: Model, examples: Sequence[Example], loss: Loss, tokens_at_a_time: int = 4096) -> float:
    """Mean loss over the target tokens of `examples`."""
    lengths = [len(e.input_ids) for e in examples]
    total, n_targets = 0.0, 0
    for micro in split_micro(range(len(examples)), lengths, tokens_at_a_time):
        batch = collate([examples[i] for i in micro])
        total += float(loss(model, batch))
        n_targets += batch.n_targets
    return total / n_targets
