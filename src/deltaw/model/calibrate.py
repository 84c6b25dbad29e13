"""What goes into each linear map when rows are read: the leading directions of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltaw.core.site import LinearSite
from deltaw.data.pack import Batch

if TYPE_CHECKING:
    from deltaw.model.model import Model

MOST_BYTES = 1_000_000_000
"""Of second moments kept at a time; a larger model reads the rows several times."""


@torch.no_grad()
def input_directions(
    model: Model, sites: Iterable[LinearSite], batches: Sequence[Batch], k: int, most_bytes: int = MOST_BYTES
) -> dict[str, Tensor]:
    """The k leading right singular vectors of the inputs of each site, over all tokens of `batches`: [k, in].

    They are eigenvectors of X^T X, which is summed in float32 and solved in float64, so that neither the order nor
    the number of rows matters. Maps that read the same input share the work.
    """
    found: dict[str, Tensor] = {}
    for part in _parts(list(sites), most_bytes):
        moments = _moments(model, part, batches)
        solved: dict[int, Tensor] = {}
        for site in part:
            moment = moments[site.name]
            if id(moment) not in solved:
                _, vectors = torch.linalg.eigh(moment.double())
                solved[id(moment)] = vectors.flip(1)[:, :k].T.float().contiguous()
            found[site.name] = solved[id(moment)]
    return found


def _parts(sites: list[LinearSite], most_bytes: int) -> list[list[LinearSite]]:
    parts: list[list[LinearSite]] = [[]]
    size = 0
    for site in sites:
        size += 4 * site.in_features**2
        if parts[-1] and size > most_bytes:
            parts.append([])
            size = 4 * site.in_features**2
        parts[-1].append(site)
    return parts


def _moments(model: Model, sites: list[LinearSite], batches: Sequence[Batch]) -> dict[str, Tensor]:
    """X^T X [in, in] of each site; the same tensor for sites that always read the same input."""
    moments: dict[str, Tensor] = {}
    last: dict[str, Any] = {"input": None, "moment": None}

    def keep(site: LinearSite) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if site.name in moments and moments[site.name] is last["moment"] and x is last["input"]:
                return  # summed already, for the map before it
            if site.name not in moments:
                same = x is last["input"]
                moments[site.name] = last["moment"] if same else x.new_zeros((x.shape[-1],) * 2, dtype=torch.float32)
                if same:
                    return
            rows = x.reshape(-1, x.shape[-1]).float()
            moments[site.name].addmm_(rows.T, rows)
            last.update(input=x, moment=moments[site.name])

        return hook

    handles = [model.places.modules[s.name].register_forward_pre_hook(keep(s)) for s in sites]
    try:
        for batch in batches:
            last.update(input=None, moment=None)
            model.pack_logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments
