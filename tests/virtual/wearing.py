"""Models that wear virtual tokens whose numbers cannot hide, and what they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from deltaw.core.spec import MethodSpec
from deltaw.methods import PrefixTuning, Prompt, PTuning
from deltaw.model.model import Model
from models import make_ids, make_net, randomise

N = 5  # virtual tokens
METHODS: dict[str, MethodSpec] = {
    "prompt": Prompt(n_tokens=N, start="random"),
    "prefix": PrefixTuning(n_tokens=N, projection=False),
    "prefix with a projection": PrefixTuning(n_tokens=N, projection=True, hidden=7),
    "ptuning": PTuning(n_tokens=N, hidden=9),
    "ptuning by lstm": PTuning(n_tokens=N, encoder="lstm", hidden=3, depth=3),
}
PLAIN = ("prompt", "prefix")  # one of each place
LENGTHS = (9, 2, 31, 2, 17, 30, 3, 1)


def documents(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    return [make_ids(1, n, seed=20 + i)[0] for i, n in enumerate(lengths)]


def wear(kind: str, method: str = "prompt", dtype: torch.dtype = torch.float32, **changes: object) -> Model:
    """A tiny model with random virtual tokens of order 1."""
    model = Model(make_net(kind, dtype=dtype, **changes))
    model.attach(METHODS[method])
    randomise(model, size=0.7)
    return model


def one_at_a_time(model: Model, docs: list[Tensor], predict: list[list[int]]) -> Tensor:
    """Logits at the predicted places, each document alone through the model's own attention."""
    rows = [model.logits(d[None])[0][torch.tensor(p, dtype=torch.long)] for d, p in zip(docs, predict, strict=True)]
    return torch.cat(rows)
