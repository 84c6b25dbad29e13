"""How the changes of several adapters become one: element by element, on dense changes in float64.

    v_i = w_i prune(dW_i)                                   a weight per adapter, negative ones included

    linear           sum of w_i dW_i                        task arithmetic (arXiv:2212.04089, section 2)
    magnitude        sum of v_i, the largest kept
    dare_linear      sum of v_i, chance keeps               DARE (arXiv:2311.03099, algorithm 1)
    ties             mean of the v_i that agree in sign     TIES (arXiv:2306.01708, algorithm 1), the largest kept
    dare_ties        the same, chance keeps

prune by magnitude: of each tensor the share `density` that is largest in size. prune by chance: each number is kept
with probability `density` and divided by it. The sign that is elected is that of the sum of the v_i; the mean is over
the adapters whose v_i has that sign, and so is not 0. Equal weights w_i = lambda are TIES' lambda.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.errors import BadInput, near

LOW_RANK = ("linear", "cat", "svd")  # one sum, in three containers
PRUNED = ("ties", "dare_linear", "dare_ties", "magnitude")
WAYS = LOW_RANK + PRUNED


@dataclass(frozen=True)
class Way:
    """How changes are summed.

    name         one of WAYS
    density      share of each adapter's numbers that is kept; for those of PRUNED only
    seed         of what DARE drops; None: 0
    shared_mask  whether DARE drops the same places of every adapter

    Raises BadInput where these do not go together.
    """

    name: str = "linear"
    density: float | None = None
    seed: int | None = None
    shared_mask: bool = False

    def __post_init__(self) -> None:
        if self.name not in WAYS:
            raise BadInput(f"unknown method {self.name!r}.{near(self.name, WAYS)} Known: {', '.join(WAYS)}.")
        if self.name in LOW_RANK and self.density is not None:
            raise BadInput(f"method {self.name!r} keeps every number: remove density, or take {', '.join(PRUNED)}.")
        if self.name in PRUNED and (self.density is None or not 0 < self.density <= 1):
            raise BadInput(
                f"method {self.name!r} keeps a share of each adapter's numbers: give density, above 0 and at most 1 "
                f"(got {self.density}). 0.2 is what TIES' authors keep."
            )
        for key, is_given in (("shared_mask", self.shared_mask), ("seed", self.seed is not None)):
            if is_given and not self.by_chance:
                raise BadInput(f"{key} is for dare_linear and dare_ties, which drop by chance, not for {self.name!r}.")

    @property
    def by_chance(self) -> bool:
        """Whether chance decides what is dropped."""
        return self.name.startswith("dare")

    @property
    def elects(self) -> bool:
        """Whether adapters vote on a sign."""
        return self.name.endswith("ties")


def total(deltas: Sequence[tuple[int, float, Tensor]], way: Way, where: str) -> Tensor:
    """The one change that `deltas` make together.

    deltas  for each adapter that changes this tensor: its number, its weight, its change [...] float64
    where   the tensor's name: chance depends on it, on the seed and on the adapter's number, on nothing else
    """
    kept = [weight * _pruned(delta, way, where, number) for number, weight, delta in deltas]
    summed = torch.zeros_like(kept[0])
    for value in kept:
        summed += value
    if not way.elects:
        return summed
    sign = summed.sign()
    agreed, votes = torch.zeros_like(sign), torch.zeros_like(sign)
    for value in kept:
        agrees = (value * sign) > 0
        agreed += value * agrees
        votes += agrees
    return agreed / votes.clamp(min=1)


def _pruned(delta: Tensor, way: Way, where: str, number: int) -> Tensor:
    if way.density is None or way.density == 1:
        return delta
    if way.by_chance:
        mask = drop_mask(tuple(delta.shape), way.density, way.seed or 0, where, 0 if way.shared_mask else number)
        return delta * mask / way.density
    return delta * trim_mask(delta, way.density)


def trim_mask(delta: Tensor, density: float) -> Tensor:
    """Which numbers of a tensor are the `density` share largest in size (at least one); equals of the last one too."""
    size = delta.abs()
    kept = max(1, int(density * size.numel()))
    least = size.flatten().kthvalue(size.numel() - kept + 1).values
    return size >= least


def drop_mask(shape: tuple[int, ...], density: float, seed: int, where: str, number: int) -> Tensor:
    """Which numbers DARE keeps in one tensor of adapter `number`: True with probability `density`."""
    key = hashlib.sha256(f"{seed}|{where}|{number}".encode()).digest()
    rng = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return torch.rand(shape, generator=rng, dtype=torch.float32) < density
