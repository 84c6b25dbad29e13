"""A change of a base, tensor by tensor, as an adapter that says it: LoRA with a rank of its own at each place.

The scale is 1 everywhere (alpha = rank), what it was is in the factors. Biases are LoRA's `bias`; tensors that are no
linear map are replaced whole (`save_modules`), with the base's values where a module has tensors that did not change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from deltaw.core.adapter import Adapter, Replacement
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec
from deltaw.core.targets import select
from deltaw.errors import AdapterError, BadInput, NotMergeable, TargetError
from deltaw.merge.factors import Cut
from deltaw.methods.bitfit import BitFit
from deltaw.methods.lora import Lora
from deltaw.model.places import Places
from deltaw.model.replaced import swapped
from deltaw.store.peft import adapter_folder, refuse_foreign

PLACING = ("targets", "exclude", "layers")


@dataclass
class Change:
    """What a base becomes.

    maps      the factors at linear maps, by site name;  biases: new ones there
    replaced  whole tensors by the network's name, in the dtype to keep them in
    """

    maps: dict[str, Cut] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Home:
    """Where the adapter belongs.

    sites        the linear maps by name, those of the base where it is known
    placings     settings of `targets`, `exclude` and `layers` to say the places with, if they say just these
    places, read the base's, and a tensor of it by name; None: only factors can be said
    """

    sites: Mapping[str, LinearSite]
    placings: Sequence[Mapping[str, Any]]
    fingerprint: BaseFingerprint | None
    places: Places | None = None
    read: Callable[[str], Tensor] | None = None


def refuse_out(out: Path, parents: Sequence[str | Path | Adapter] = ()) -> None:
    """Raise AdapterError, before any work, unless `out` can hold the result: no other files, and none of `parents`."""
    refuse_foreign(out)
    for parent in parents:
        if not isinstance(parent, Adapter) and adapter_folder(parent).resolve() == out.resolve():
            raise AdapterError(f"{out} is an adapter that the result is made from: it would be lost. Choose another.")


def adapter_of(change: Change, home: Home, overrides: dict[str, Any], provenance: dict[str, Any]) -> Adapter:
    """The adapter that makes `change`. Raises BadInput when it changes nothing, or no linear map."""
    owners = sorted({name.rpartition(".")[0] for name in change.replaced})
    spec = _spec(change, home, owners)
    sites: dict[str, dict[str, Tensor]] = {n: {"A": c.A, "B": c.B} for n, c in change.maps.items()}
    for name, bias in change.biases.items():
        sites.setdefault(name, {})["bias"] = bias
    replaced = dict(change.replaced)
    if home.places is not None and home.read is not None:
        for name, site in home.places.sites.items():
            inside = any(name == o or name.startswith(o + ".") for o in owners)
            has = "bias" in spec.shapes(site, name in change.maps) and (name in sites or spec.wants(site))
            if has and not inside and "bias" not in sites.get(name, {}):
                sites.setdefault(name, {})["bias"] = home.read(f"{name}.bias").float().clone()
        for name in swapped(spec, home.places):
            if name not in replaced:
                replaced[name] = home.read(name).clone()
    order = [n for n in home.sites if n in sites]
    return Adapter(
        spec=spec,
        sites={n: sites[n] for n in order},
        places=tuple(home.sites[n] for n in order),
        replaced=tuple(Replacement(n, replaced[n]) for n in sorted(replaced)),
        overrides=dict(overrides),
        fingerprint=home.fingerprint,
        provenance=provenance,
    )


def ranks_as_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """LoRA's settings for a rank at each site and a scale of 1: the commonest rank, patterns for the others."""
    if not ranks:
        raise BadInput("No linear map changes: there is nothing to make factors of.")
    common = Counter(ranks.values()).most_common(1)[0][0]
    roles: dict[str, set[int]] = {}
    for name, rank in ranks.items():
        roles.setdefault(name.rpartition(".")[2], set()).add(rank)
    pattern: dict[str, int] = {}
    for name, rank in ranks.items():
        role = name.rpartition(".")[2]
        key = role if len(roles[role]) == 1 else name  # first the key of a place, PEFT takes the first that matches
        if rank != common:
            pattern[key] = rank
    alphas = {key: float(rank) for key, rank in pattern.items()}
    return {"rank": common, "alpha": float(common), "rslora": False, "rank_pattern": pattern, "alpha_pattern": alphas}


def _spec(change: Change, home: Home, owners: list[str]) -> MethodSpec:
    _refuse_inside(owners, change)
    if not change.maps:
        if not change.biases:
            raise BadInput("No linear map and no bias of one changes: an adapter has no place to sit at.")
        targets = tuple(n for n in home.sites if n in change.biases)
        return BitFit(targets=targets, norms=False, save_modules=tuple(owners))
    here = {n: c.rank for n, c in change.maps.items()}
    placing = next((p for p in home.placings if _says(p, owners, here, home)), None)
    placing = placing or {"targets": tuple(n for n in home.sites if n in here)}
    elsewhere = set(change.biases) - set(here)
    bias: Literal["none", "all", "lora_only"] = "all" if elsewhere else "lora_only" if change.biases else "none"
    spec = Lora(**ranks_as_settings(here), **placing, bias=bias, save_modules=tuple(owners))
    wrong = [n for n, rank in here.items() if spec.rank_at(home.sites[n]) != rank or spec.scale_at(home.sites[n]) != 1]
    assert not wrong, f"patterns do not say the ranks at {wrong}"
    return spec


def _refuse_inside(owners: list[str], change: Change) -> None:
    """Raise NotMergeable where a module that is replaced whole holds a linear map that changes too."""
    for owner in owners:
        hit = [n for n in (*change.maps, *change.biases) if n == owner or n.startswith(owner + ".")]
        if hit:
            raise NotMergeable(f"{owner} is replaced whole, and {hit[0]} inside it changes too: no adapter says both.")


def _says(placing: Mapping[str, Any], owners: list[str], ranks: Mapping[str, int], home: Home) -> bool:
    """Whether these settings name exactly the places of `ranks`."""
    if home.places is None:
        return True  # the settings are those that every adapter has, at the same places
    try:
        chosen = select(Lora(**placing, save_modules=tuple(owners)), list(home.places.sites.values()))
    except TargetError:
        return False
    return {s.name for s in chosen} == set(ranks)
