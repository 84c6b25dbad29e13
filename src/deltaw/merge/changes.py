"""What an adapter does to each tensor of a base: a change per tensor name, ready to be computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.core.affine import Affine, merged
from deltaw.errors import NotMergeable, WorkFailed
from deltaw.model.attachment import Attachment
from deltaw.model.places import Places

Ties = Mapping[str, tuple[str, ...]]
"""A tensor's name -> the other names that share its memory."""


@dataclass(frozen=True)
class Change:
    """What happens to one stored tensor, in this order: swapped whole, changed by an Affine, added to, rows set.

    transposed  whether the tensor is stored as [in, out] (GPT-2's Conv1D, embeddings)
    rows        (row numbers [n], values [n, ...]); numbers at or beyond the end make the tensor grow.
                Rows in between that no one gives (the tokenizer knows more than the base) are the mean row
    add         gives what is added, float64, of the stored tensor's shape
    """

    swap: Tensor | None = None
    affine: Affine | None = None
    transposed: bool = False
    rows: tuple[Tensor, Tensor] | None = None
    add: Callable[[], Tensor] | None = None

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """The shape afterwards."""
        return before if self.rows is None else (max(before[0], int(self.rows[0].max()) + 1), *before[1:])

    def apply(self, stored: Tensor) -> Tensor:
        """The changed tensor in float32 (float64 stays). Raises WorkFailed on NaN or Inf."""
        dtype = torch.float64 if stored.dtype == torch.float64 else torch.float32
        value = (stored if self.swap is None else self.swap).to(dtype)
        if self.affine is not None:
            w, _ = merged(self.affine, value.T if self.transposed else value)
            value = w.T if self.transposed else w
        if self.add is not None:
            value = (value.double() + self.add()).to(dtype)
            if not bool(torch.isfinite(value).all()):
                raise WorkFailed("The sum holds NaN or Inf. Nothing was written; check the adapters and their weights.")
        if self.rows is not None:
            number, rows = self.rows
            grown = value.mean(0).expand(self.shape(tuple(value.shape))).clone()
            grown[: value.shape[0]] = value
            value = grown.index_copy(0, number, rows.to(dtype))
        return value

    def is_like(self, other: Change | None) -> bool:
        """Whether two tied tensors stay tied: nothing but the same rows happens to both."""
        return (
            other is not None
            and self.rows is other.rows
            and all(x is None for x in (self.swap, self.affine, self.add, other.swap, other.affine, other.add))
        )


def changes_of(made: Attachment, places: Places, ties: Ties) -> dict[str, Change]:
    """The changes of a strictly matched adapter by the network's tensor names. No base tensor is kept.

    Raises NotMergeable for what plain weights cannot hold.
    """
    found: dict[str, Change] = {name: Change(swap=value) for name, value in made.swaps.items()}
    for name in made.sites:
        site, affine = places.sites[name], made.lowered(name, places)
        assert isinstance(affine, Affine)
        if affine.bias is not None:
            if not site.has_bias:
                raise NotMergeable(f"The adapter adds a bias at {name}, where the base has none: a plain model cannot.")
            found[f"{name}.bias"] = Change(swap=affine.bias)
        if affine.A is not None or affine.out_gain is not None or affine.in_gain is not None:
            before = found.get(f"{name}.weight", Change())
            found[f"{name}.weight"] = replace(
                before, affine=replace(affine, bias=None), transposed=site.kind != "linear"
            )
    for tensor, rows in made.rows.items():
        for owner in (tensor, *(t for t in ties.get(tensor, ()) if t not in made.rows)):
            found[owner] = replace(found.get(owner, Change()), rows=rows)
            site_name = owner.removesuffix(".weight")
            if places.sites[site_name].has_bias:  # a head's swapped columns have no bias
                before = found.get(f"{site_name}.bias", Change())
                found[f"{site_name}.bias"] = replace(before, rows=(rows[0], rows[1].new_zeros(len(rows[0]))))
    return found


def grown_vocabulary(changes: Mapping[str, Change], net: PreTrainedModel) -> int | None:
    """The new size of the vocabulary when rows were added, else None.

    Raises NotMergeable when the embedding and the head would differ in size.
    """
    tensors = dict(net.named_parameters(remove_duplicate=False))
    ends = [m for m in (net.get_input_embeddings(), net.get_output_embeddings()) if m is not None]
    names = [next(n for n, m in net.named_modules() if m is end) + ".weight" for end in ends]
    before = {n: tensors[n].shape[0] for n in names}
    after = {n: changes[n].shape((size,))[0] if n in changes else size for n, size in before.items()}
    if after == before:
        return None
    if len(set(after.values())) > 1:
        sizes = ", ".join(f"{n} {size}" for n, size in after.items())
        raise NotMergeable(f"The adapter would make the embedding and the head differ in rows ({sizes}).")
    return after[names[0]]


def checked(name: str, change: Change, stored: Tensor) -> Tensor:
    """`change.apply(stored)`, with the tensor's name in the error."""
    try:
        return change.apply(stored)
    except WorkFailed as error:
        raise WorkFailed(f"{name}: {error}") from None
