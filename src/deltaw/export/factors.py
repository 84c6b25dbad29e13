"""An adapter as pairs of factors, for formats that know nothing but LoRA; what is more than that is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.misfits import some
from deltaw.core.site import LinearSite
from deltaw.errors import AdapterError
from deltaw.export.opened import Opened


@dataclass(frozen=True)
class Factors:
    """The change s * B A at one linear map: A [r, in], B [out, r], float32."""

    site: LinearSite
    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of B."""
        return self.B.shape[1]

    @property
    def alpha(self) -> float:
        """What alpha must be for alpha / rank to be the scale."""
        return self.scale * self.rank


def factors_of(base: Opened) -> tuple[list[Factors], list[str]]:
    """Every low-rank change of the adapter, in the adapter's order, and a sentence for each part that is none.

    Raises AdapterError when the adapter does not fit the base.
    """
    adapter = base.adapter
    assert adapter is not None
    spec = adapter.spec
    problems: list[str] = []
    if spec.sits != "linear":
        where = {"block": "beside the halves of blocks"}.get(spec.sits, "in front of the sequence")
        return [], [f"method {spec.name!r} works {where} ({some(list(adapter.sites))}), not at linear maps"]
    made, places = base.source.match(adapter)
    found: list[Factors] = []
    gains: list[str] = []
    biases: list[str] = []
    for name in made.sites:
        form, site = made.lowered(name, places), places.sites[name]
        assert isinstance(form, Affine)
        if not form.is_low_rank_only:
            gains.append(name)
        if form.bias is not None:
            biases.append(name)
        if form.A is not None and form.B is not None:
            found.append(Factors(site, form.A.float(), form.B.float(), form.scale))
    if gains:
        problems.append(f"method {spec.name!r} multiplies whole rows or columns, at {len(gains)} maps: {some(gains)}")
    if biases:
        problems.append(f"biases are trained, at {len(biases)} maps: {some(biases)}")
    if swapped := list(made.swaps):
        problems.append(f"whole tensors are replaced: {some(swapped, most=12)}")
    if made.rows:
        tokens = f" (new tokens {', '.join(spec.new_tokens)})" if spec.new_tokens else ""
        problems.append(f"rows of tensors are replaced: {some(list(made.rows), most=12)}{tokens}")
    if made.overrides:
        problems.append(f"settings of the base are changed: {some(sorted(made.overrides))}")
    return found, problems


def common_alpha(factors: Sequence[Factors]) -> float:
    """The alpha that most of the factors need, the first of them where two are as frequent."""
    needed = [f.alpha for f in factors]
    return max(needed, key=needed.count)


def folded(factor: Factors, alpha: float, rank: int) -> Tensor:
    """B [out, r] in float32, such that alpha / rank times it is scale times the B of `factor`.

    Where alpha and rank are the factor's own, B is what it was, bit for bit.
    """
    if alpha == factor.alpha and rank == factor.rank:
        return factor.B
    return (factor.B.double() * (factor.scale * rank / alpha)).float()


def padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A [rank, in] and B [out, rank]: the same product, with zeros behind."""
    more = rank - A.shape[0]
    return torch.cat([A, A.new_zeros(more, A.shape[1])]), torch.cat([B, B.new_zeros(B.shape[0], more)], dim=1)


def refuse_empty(factors: Sequence[Factors]) -> None:
    """Raise AdapterError when there is nothing to write."""
    if not factors:
        raise AdapterError("The adapter holds no low-rank change: there is nothing to write.")
