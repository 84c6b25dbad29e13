"""A full fine-tune minus its base, as an adapter: LoRA where the base has linear maps, what changed whole elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.core.fingerprint import HARD, BaseFingerprint, fingerprint_folder
from deltaw.errors import BadInput, BaseError, BaseMismatch, NotMergeable, ShapeError
from deltaw.merge.as_adapter import Change, Home, adapter_of, refuse_out
from deltaw.merge.checkpoint import Checkpoint
from deltaw.merge.cuts import SiteCut, together
from deltaw.merge.factors import Keep, cut_dense
from deltaw.merge.source import Source
from deltaw.model.load import folder_format, resolve_base
from deltaw.model.places import Places
from deltaw.store.peft import write_adapter

Say = Callable[[str], None]


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction wrote.

    adapter   the id of the adapter;  base, tuned: the two models, by name and hash
    sites     each linear map that changed: the rank that was kept, |dW|, and the relative error there
    error     |dW - dW'| / |dW| over all these together
    replaced  tensors that changed and are no linear map's matrix: kept whole, without an error
    biases    linear maps whose bias changed: kept whole too
    """

    out: str
    adapter: str
    base: str
    tuned: str
    rank: int | None
    energy: float | None
    sites: tuple[SiteCut, ...]
    error: float
    replaced: tuple[str, ...]
    biases: tuple[str, ...]
    n_parameters: int
    size_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    say: Say | None = None,
) -> ExtractReport:
    """Write what a full fine-tune changed as an adapter, one tensor at a time: two of them are in memory.

    At each linear map, the head included, B A is the best approximation of W_tuned - W_base, by the exact singular
    value decomposition in float64. Norms, embeddings and biases that changed are kept whole, and so exactly: they are
    no matrices between hidden features. Full rank reproduces the tuned model.

    base, tuned  folders in Hugging Face layout, hub ids, starter names; of one architecture, not quantised
    rank         at most this rank at each map
    energy       at each map the lowest rank that keeps this share of |dW|^2 (0.9); with `rank` too, whichever is lower
    say          called with a line for each map

    Raises BadInput, BaseError, BaseMismatch (another architecture or vocabulary), ShapeError, NotMergeable, WorkFailed.
    """
    started = time.monotonic()
    keep = _keep(rank, energy)
    refuse_out(Path(out))
    folders = [resolve_base(base), resolve_base(tuned)]
    for folder in folders:
        if (saved := folder_format(folder)) is not None:
            raise NotMergeable(f"{folder} holds {saved.name} weights: give the 16- or 32-bit models.")
    prints = [fingerprint_folder(folder) for folder in folders]
    _refuse_strangers(*prints)
    with Checkpoint(folders[0]) as one, Checkpoint(folders[1]) as two:
        sources = [Source(f, c, [], p.dtype) for f, c, p in zip(folders, (one, two), prints, strict=True)]
        source, other = sources
        change = _changes(source, other, keep, say or (lambda line: None))
        places = Places.of(source.net, source.sites, {}, {}, dict(source.net.named_modules()))
        home = Home(source.sites, [{"targets": "all-linear"}], prints[0], places, source.read)
        how = {"tuned": prints[1].short(), "tuned_weights": prints[1].weights, "rank": rank, "energy": energy}
        told = {"base_model_name_or_path": str(folders[0].resolve()), "parents": [], "extract": how}
        made = adapter_of(change, home, {}, told)
    path = write_adapter(made, out)
    return ExtractReport(
        out=str(path),
        adapter=made.id,
        base=prints[0].short(),
        tuned=prints[1].short(),
        rank=rank,
        energy=energy,
        sites=tuple(SiteCut(n, c.rank, c.norm, c.error) for n, c in change.maps.items()),
        error=together(change.maps.values()),
        replaced=tuple(change.replaced),
        biases=tuple(change.biases),
        n_parameters=made.n_parameters,
        size_bytes=sum(p.stat().st_size for p in path.glob("*.safetensors")),
        seconds=round(time.monotonic() - started, 3),
    )


def _keep(rank: int | None, energy: float | None) -> Keep:
    if rank is None and energy is None:
        raise BadInput("give the rank to keep, or the share of the change: rank=16 (--rank 16), energy=0.9.")
    if energy is not None and not 0 < energy <= 1:
        raise BadInput(f"energy is {energy}; it is a share of |dW|^2: above 0 and at most 1.")
    return Keep(rank, None if energy is None else math.sqrt(1 - energy))


def _refuse_strangers(base: BaseFingerprint, tuned: BaseFingerprint) -> None:
    """Raise BaseMismatch unless the two differ in their weights alone, BadInput when not even there."""
    found = base.differences(tuned)
    hard = [f"  {k}: base has {a[:12]}, tuned model has {b[:12]}" for k, (a, b) in found.items() if k in HARD[1:]]
    if hard:
        raise BaseMismatch(
            f"{tuned.short()} is no fine-tune of {base.short()}: more than weights differs.\n" + "\n".join(hard) + "\n"
            "  Give the base that it was tuned from."
        )
    if base.weights == tuned.weights:
        raise BadInput(f"{base.short()} and {tuned.short()} hold the same weights: there is no change to extract.")


def _changes(base: Source, tuned: Source, keep: Keep, say: Say) -> Change:
    """What differs, tensor by tensor."""
    if base.kind != tuned.kind or set(base.tensors) != set(tuned.tensors):
        raise BaseMismatch("The two models have different tensors: one has a head that the other has not.")
    change = Change()
    for name in base.tensors:
        _compare(name, base, tuned, keep, say, change)
    return change


def _compare(name: str, base: Source, tuned: Source, keep: Keep, say: Say, change: Change) -> None:
    """Put what differs in one tensor into `change`."""
    before, after = base.read(name), tuned.read(name)
    if before.shape != after.shape:
        raise ShapeError(
            f"{name} is {tuple(before.shape)} in the base and {tuple(after.shape)} in the tuned model: a vocabulary "
            "that grew is no change of the base's weights, and is not extracted."
        )
    if not bool(torch.isfinite(after).all()):
        raise BaseError(f"the tuned model holds NaN or infinity in {name}: take an earlier checkpoint of it.")
    if torch.equal(before, after) if before.dtype == after.dtype else not bool((before != after).any()):
        return
    owner, _, leaf = name.rpartition(".")
    site = base.sites.get(owner)
    if site is None or site.kind == "embedding" or leaf not in ("weight", "bias"):
        change.replaced[name] = after.clone()
    elif leaf == "bias":
        change.biases[owner] = after.float()
    else:
        delta = after.double().sub_(before)
        del before, after
        cut = cut_dense(delta if site.kind == "linear" else delta.T, keep, owner)
        change.maps[owner] = cut
        say(f"{owner}: rank {cut.rank}, error {cut.error:.3g} of {cut.norm:.3g}")
