"""Losses by name. Each gives the sum over a batch's targets; the loop divides by the whole step's targets."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deltaw.data.pack import Batch
from deltaw.errors import RecipeError, near
from deltaw.model.model import Model

Loss = Callable[[Model, Batch], Tensor]


def sft(model: Model, batch: Batch) -> Tensor:
    """Supervised fine-tuning: summed negative log-likelihood of the target tokens."""
    return model.pack_loss(batch)


LOSSES: dict[str, Loss] = {"sft": sft}


def find_loss(name: str) -> Loss:
    """The loss called `name`; RecipeError with the near name if there is none."""
    if name not in LOSSES:
        raise RecipeError(f"train.loss: unknown loss {name!r}.{near(name, LOSSES)} Known: {', '.join(LOSSES)}.")
    return LOSSES[name]
