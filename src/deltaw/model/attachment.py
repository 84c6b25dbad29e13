"""From a method's settings to what one model will hold of an adapter. Nothing is installed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter, Replacement
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.site import LinearSite, Site
from deltaw.core.spec import Form, Made, MethodSpec, Params, Start
from deltaw.core.targets import matches
from deltaw.errors import SpecError, TargetError
from deltaw.model.places import Places
from deltaw.model.replaced import owners, swapped
from deltaw.ops.arena import physical_bytes


@dataclass
class Attachment:
    """One adapter on one model.

    sites      parameters by site name;  places: the sites themselves
    shared     parameters of the whole adapter
    swaps      whole replaced tensors by the base's tensor name
    rows       swapped or added rows of a tensor: name -> (row numbers, [n, dim] values)
    overrides  settings of the base's config that hold while it is in use
    trainable  whether its tensors, but the method's `fixed` ones, are leaves that ask for gradients
    """

    spec: MethodSpec
    sites: dict[str, Params] = field(default_factory=dict)
    places: dict[str, Site] = field(default_factory=dict)
    shared: Params = field(default_factory=dict)
    swaps: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    trainable: bool = False
    fingerprint: BaseFingerprint | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name."""
        named = {f"{site}:{p}": t for site, params in self.sites.items() for p, t in params.items()}
        named |= {f"shared:{p}": t for p, t in self.shared.items()}
        named |= {f"replace:{name}": t for name, t in self.swaps.items()}
        named |= {f"rows:{name}": value for name, (_, value) in self.rows.items()}
        return named

    def parameters(self) -> dict[str, Tensor]:
        """The tensors that can train, by the same names."""
        fixed = type(self.spec).fixed
        held = [*self.sites.values(), self.shared]
        still = {id(t) for params in held for p, t in params.items() if p in fixed}
        return {n: t for n, t in self.tensors().items() if id(t) not in still}

    def to(self, device: torch.device) -> None:
        """Hold every tensor on `device`; what trains stays a leaf."""
        moved: dict[int, Tensor] = {}

        def there(t: Tensor) -> Tensor:
            if t.device == device:
                return t
            if id(t) not in moved:
                moved[id(t)] = t.detach().to(device).requires_grad_(t.requires_grad)
            return moved[id(t)]

        self.sites = {s: {p: there(t) for p, t in params.items()} for s, params in self.sites.items()}
        self.shared = {p: there(t) for p, t in self.shared.items()}
        self.swaps = {n: there(t) for n, t in self.swaps.items()}
        self.rows = {n: (ids.to(device), there(value)) for n, (ids, value) in self.rows.items()}

    def at(self, site: str) -> Params:
        """What `lower` takes at a site: its parameters and the shared ones."""
        return {**self.shared, **self.sites[site]}

    def lowered(self, site: str, places: Places) -> Form:
        """The normal form at one site."""
        place = self.places[site]
        weight, bias = places.weight_at(place), places.biases.get(site) if isinstance(place, LinearSite) else None
        return self.spec.lower(place, self.at(site), weight, bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def to_adapter(self, provenance: dict[str, Any]) -> Adapter:
        """A finished copy of the present state, settled as the method saves it."""
        made = self.spec.settled(Made(self.spec, self.sites, self.shared), self.places)

        def copied(t: Tensor) -> Tensor:
            return t.detach().cpu().clone().contiguous()

        replaced = [Replacement(name, copied(t)) for name, t in sorted(self.swaps.items())]
        replaced += [
            Replacement(name, copied(value), tuple(ids.tolist())) for name, (ids, value) in sorted(self.rows.items())
        ]
        return Adapter(
            spec=made.spec,
            sites={s: {p: copied(t) for p, t in params.items()} for s, params in made.sites.items()},
            places=tuple(self.places[s] for s in made.sites),
            shared={p: copied(t) for p, t in made.shared.items()},
            replaced=tuple(replaced),
            overrides=dict(self.overrides),
            fingerprint=self.fingerprint,
            provenance={**self.provenance, **provenance},
        )


@dataclass(frozen=True)
class Beside:
    """What some methods start from, beside the base as it is held.

    source      a site's name -> its W [out, in] before quantisation
    directions  a site's name -> leading right singular vectors of its inputs
    encode      text -> token ids
    """

    source: Callable[[str], Tensor] | None = None
    directions: Mapping[str, Tensor] = field(default_factory=dict)
    encode: Callable[[str], Sequence[int]] | None = None


def fresh(spec: MethodSpec, places: Places, rng: torch.Generator, beside: Beside | None = None) -> Attachment:
    """New, trainable parameters for `spec`. Raises TargetError when its places are not there."""
    attachment = Attachment(spec, trainable=True)
    if spec.trains_base:
        return attachment
    chosen = places.chosen(spec)
    _refuse_idle(spec, list(chosen.values()), places)
    attachment.places = _wanted(spec, chosen, places)
    _refuse_too_large(spec, attachment.places, chosen)
    fixed = type(spec).fixed
    every = list(attachment.places.values())
    shared = spec.init_shared(every, rng)
    attachment.shared = {p: _leaf(shared[p], p not in fixed) for p in spec.shared_shapes(every)}
    for name, site in attachment.places.items():
        made = spec.init(site, _start(site, places, rng, beside or Beside()))
        shapes = spec.shapes(site, name in chosen)
        attachment.sites[name] = {p: _leaf(made[p], p not in fixed) for p in shapes}
    for tensor, value in swapped(spec, places).items():
        attachment.swaps[tensor] = value.detach().float().clone().requires_grad_()
    return attachment


def _refuse_too_large(spec: MethodSpec, places: Mapping[str, Site], chosen: Mapping[str, Site]) -> None:
    """Raise SpecError for parameters that no memory of this machine holds, before it is asked for them."""
    shapes = [shape for name, site in places.items() for shape in spec.shapes(site, name in chosen).values()]
    shapes += spec.shared_shapes(list(places.values())).values() if places else []
    needed, there = 4 * sum(map(math.prod, shapes)), physical_bytes()
    if there and needed > there and torch.get_default_device().type != "meta":  # a plan is for any machine
        raise SpecError(
            f"The adapter's parameters alone would take {needed / 1e9:,.0f} GB, and this machine has "
            f"{there / 1e9:,.1f} GB of memory: choose a lower rank (or size), or fewer targets."
        )


def _leaf(value: Tensor, trains: bool) -> Tensor:
    return value.detach().requires_grad_(trains)


def _start(site: Site, places: Places, rng: torch.Generator, beside: Beside) -> Start:
    source = beside.source
    return Start(
        rng,
        places.weight_at(site),
        places.biases.get(site.name) if isinstance(site, LinearSite) else None,
        None if source is None else lambda: source(site.name),
        beside.directions.get(site.name),
        beside.encode,
    )


def _wanted(spec: MethodSpec, chosen: dict[str, Site], places: Places) -> dict[str, Site]:
    """The chosen sites and those that `spec` wants all the same, in the model's order."""
    if spec.sits != "linear":
        return chosen
    saved = owners(spec, places)
    return {n: s for n, s in places.sites.items() if n in chosen or (spec.wants(s) and n not in saved)}


def _refuse_idle(spec: MethodSpec, chosen: list[Site], places: Places) -> None:
    """Raise TargetError for settings of single places that would do nothing, and for a place that would train twice."""
    idle = spec.idle(chosen)
    if spec.sits == "linear" and isinstance(spec.exclude, str):
        idle += [] if any(matches(spec.exclude, name) for name in places.sites) else [f"exclude {spec.exclude!r}"]
    if idle:
        roles = ", ".join(sorted({s.role for s in chosen}))
        raise TargetError(f"{', '.join(idle)} matches none of the targeted places. Their names end in: {roles}.")
    for tensor in swapped(spec, places):
        if any(tensor.startswith(s.name + ".") for s in chosen):
            raise TargetError(
                f"save_modules names {tensor}, which is targeted too: exclude it, or do not save it whole."
            )
