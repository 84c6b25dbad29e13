"""From a method's settings or a finished adapter to what hosts of one model will hold. Nothing is installed here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.adapter import Adapter, Replacement
from deltaw.core.affine import check
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec, Params
from deltaw.core.targets import matches, select
from deltaw.core.weight import Weight
from deltaw.errors import AdapterError, ShapeError, TargetError, near
from deltaw.model.frozen import FrozenLinear


@dataclass
class Attachment:
    """One adapter on one model.

    sites      parameters by site name
    swaps      whole replaced tensors by the base's tensor name
    rows       swapped or added rows of a tensor: name -> (row numbers, [n, dim] values)
    trainable  whether its tensors are leaves that ask for gradients
    """

    spec: MethodSpec
    sites: dict[str, Params] = field(default_factory=dict)
    swaps: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    trainable: bool = False
    fingerprint: BaseFingerprint | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        """Every tensor by a unique name."""
        named = {f"{site}:{p}": t for site, params in self.sites.items() for p, t in params.items()}
        named |= {f"replace:{name}": t for name, t in self.swaps.items()}
        named |= {f"rows:{name}": value for name, (_, value) in self.rows.items()}
        return named

    def to_adapter(self, places: Mapping[str, LinearSite], provenance: dict[str, Any]) -> Adapter:
        """A finished copy of the present state."""

        def copied(t: Tensor) -> Tensor:
            return t.detach().cpu().clone().contiguous()

        replaced = [Replacement(name, copied(t)) for name, t in sorted(self.swaps.items())]
        replaced += [
            Replacement(name, copied(value), tuple(ids.tolist())) for name, (ids, value) in sorted(self.rows.items())
        ]
        return Adapter(
            spec=self.spec,
            sites={s: {p: copied(t) for p, t in params.items()} for s, params in self.sites.items()},
            places=tuple(places[s] for s in self.sites),
            replaced=tuple(replaced),
            fingerprint=self.fingerprint,
            provenance={**self.provenance, **provenance},
        )


@dataclass(frozen=True)
class Places:
    """What a model offers: its linear maps with their weights, and all its named modules."""

    sites: dict[str, LinearSite]
    weights: dict[str, Weight]
    biases: dict[str, Tensor | None]
    modules: dict[str, nn.Module]


def fresh(spec: MethodSpec, places: Places, rng: torch.Generator) -> Attachment:
    """New, trainable parameters for `spec`. Raises TargetError when its places are not there."""
    attachment = Attachment(spec, trainable=True)
    if spec.trains_base:
        return attachment
    chosen = select(spec, list(places.sites.values()))
    targeted = {s.name for s in chosen}
    _refuse_idle(spec, chosen, places)
    saved = _owners(spec, places)
    for name, site in places.sites.items():
        if name not in targeted and (not spec.wants(site) or name in saved):
            continue
        made = spec.init(site, places.weights[name], places.biases[name], rng)
        shapes = spec.shapes(site, name in targeted)
        attachment.sites[name] = {p: made[p].requires_grad_() for p in shapes}
    for tensor, value in _swapped(spec, places).items():
        attachment.swaps[tensor] = value.detach().float().clone().requires_grad_()
    return attachment


def _swapped(spec: MethodSpec, places: Places) -> dict[str, Tensor]:
    """The base's tensors that `spec` replaces whole: those of `save_modules`, and biases of norms for bias = "all"."""
    found = {n: t for module in saved_modules(spec, places) for n, t in own_tensors(module, places)}
    return found | dict(_other_biases(places) if getattr(spec, "bias", "none") == "all" else ())


def _owners(spec: MethodSpec, places: Places) -> set[str]:
    """The modules whose tensors `save_modules` replaces."""
    return {n.rpartition(".")[0] for module in saved_modules(spec, places) for n, _ in own_tensors(module, places)}


def _refuse_idle(spec: MethodSpec, chosen: list[LinearSite], places: Places) -> None:
    """Raise TargetError for settings of single places that would do nothing, and for a place that would train twice."""
    idle = spec.idle(chosen)
    if isinstance(spec.exclude, str) and not any(matches(spec.exclude, name) for name in places.sites):
        idle.append(f"exclude {spec.exclude!r}")
    if idle:
        roles = ", ".join(sorted({s.role for s in chosen}))
        raise TargetError(f"{', '.join(idle)} matches none of the targeted places. Their names end in: {roles}.")
    for tensor in _swapped(spec, places):
        if any(tensor.startswith(s.name + ".") for s in chosen):
            raise TargetError(
                f"save_modules names {tensor}, which is targeted too: exclude it, or do not save it whole."
            )


def saved_modules(spec: MethodSpec, places: Places) -> list[str]:
    """The modules whose path ends in a name of `save_modules`, as PEFT matches them: "norm" is every norm."""
    found: list[str] = []
    for wanted in spec.save_modules:
        hits = [n for n in places.modules if n == wanted or n.endswith(wanted)]
        if not hits:
            roles = sorted({n.rsplit(".", 1)[-1] for n in places.modules if n})
            raise TargetError(f"save_modules {wanted!r} matches no module.{near(wanted, roles)}")
        found += [h for h in hits if h not in found]
    return found


def own_tensors(module: str, places: Places) -> list[tuple[str, Tensor]]:
    """The base's parameters inside one module, by full names, whatever wears adapters now.

    Raises TargetError for a module whose weight is quantised: it is only read, so nothing can take its place.
    """
    found: list[tuple[str, Tensor]] = []
    for path, inner in places.modules.items():
        if path != module and not path.startswith(module + "."):
            continue
        if isinstance(inner, FrozenLinear):
            raise TargetError(
                f"save_modules names {module}, but {path}.weight is quantised and only read.\n"
                "  Adapt it (name it in targets), or load the base with format='dense'."
            )
        found += [(f"{path}.{name}", p) for name, p in inner.named_parameters(recurse=False)]
    return found


def _other_biases(places: Places) -> list[tuple[str, Tensor]]:
    """Biases that belong to no linear map: those of norms."""
    return [
        (f"{name}.bias", module.bias)
        for name, module in places.modules.items()
        if name not in places.sites and isinstance(getattr(module, "bias", None), nn.Parameter)
    ]


def strict(adapter: Adapter, places: Places, base_tensors: Mapping[str, Tensor]) -> Attachment:
    """An adapter's tensors matched with the model, each one consumed and each expected one present.

    Raises AdapterError that lists unknown places, missing parameters and wrong shapes.
    """
    spec = adapter.spec if adapter.fingerprint is not None else _as_peft_meant(adapter, places)
    problems: list[str] = []
    attachment = Attachment(spec, fingerprint=adapter.fingerprint, provenance=dict(adapter.provenance))
    try:
        targeted = {s.name for s in select(spec, list(places.sites.values()))} if not spec.trains_base else set()
        swapped, owners = _swapped(spec, places), _owners(spec, places)
    except TargetError as error:
        targeted = {name for name, params in adapter.sites.items() if set(params) != {"bias"}}
        swapped, owners = {}, set()
        problems.append(str(error).rstrip("."))
    unknown = [name for name in adapter.sites if name not in places.sites]
    if unknown:
        roles = sorted(places.sites)
        problems.append(f"no such place in this model: {_some(unknown)}.{near(unknown[0], roles)}")
    for name, params in adapter.sites.items():
        if name not in places.sites:
            continue
        problems += _misfit(spec, places, name, params, name in targeted)
        attachment.sites[name] = {p: t.detach().clone() for p, t in params.items()}
    if absent := [name for name in places.sites if name in targeted and name not in adapter.sites]:
        problems.append(f"no tensors for {_some(absent)}, which its settings target")
    given = {r.tensor for r in adapter.replaced}
    biases = [
        f"{name}.bias"
        for name, site in places.sites.items()
        if spec.wants(site) and name not in targeted | owners and name not in adapter.sites
    ]
    if absent := [tensor for tensor in (*swapped, *biases) if tensor not in given]:
        problems.append(f"no tensors for {_some(absent)}, which its settings replace")
    for r in adapter.replaced:
        base = base_tensors.get(r.tensor)
        if not bool(torch.isfinite(r.value).all()):
            problems.append(f"{r.tensor} holds NaN or Inf")
        if base is None:
            problems.append(f"it replaces {r.tensor}, which this model does not have")
        elif r.rows is not None:
            if r.value.shape != (len(r.rows), base.shape[1]):
                problems.append(f"rows of {r.tensor} have shape {tuple(r.value.shape)}, need {base.shape[1]} columns")
            attachment.rows[r.tensor] = (torch.tensor(r.rows, dtype=torch.long), r.value.detach().clone())
        elif r.value.shape != base.shape:
            problems.append(f"{r.tensor} has shape {tuple(r.value.shape)}, this model's is {tuple(base.shape)}")
        elif r.tensor in swapped or not torch.equal(r.value.to(base.dtype), base):  # PEFT saves unchanged embeddings
            attachment.swaps[r.tensor] = r.value.detach().clone()
    if problems:
        raise AdapterError("The adapter does not fit this model: " + "; ".join(problems) + ".")
    return attachment


def _as_peft_meant(adapter: Adapter, places: Places) -> MethodSpec:
    """A foreign adapter's settings where PEFT reads them differently from us.

    PEFT saves lists with names that match nothing (its #1959), and layers_to_transform that it ignored because the
    targets were whole paths. No tensor can be missed by this: each must still find its place.
    """
    spec = adapter.spec
    if not isinstance(spec.targets, str):
        there = tuple(t for t in spec.targets if any(matches((t,), name) for name in places.sites))
        spec = spec.model_copy(update={"targets": there}) if there else spec
    if spec.layers is not None:
        every = spec.model_copy(update={"layers": None})
        given = {name for name, params in adapter.sites.items() if set(params) != {"bias"}}
        with suppress(TargetError):  # `strict` raises it with everything else that does not fit
            if {s.name for s in select(every, list(places.sites.values()))} == given:
                return every
    return spec


def _misfit(spec: MethodSpec, places: Places, name: str, params: Params, targeted: bool) -> list[str]:
    site = places.sites[name]
    wanted = spec.shapes(site, targeted)
    problems = []
    if missing := [p for p in wanted if p not in params]:
        problems.append(f"{name} lacks {', '.join(missing)}")
    if extra := [p for p in params if p not in wanted]:
        problems.append(f"{name} has {', '.join(extra)}, which its settings do not ask for")
    for p, shape in wanted.items():
        if p in params and tuple(params[p].shape) != tuple(shape):
            problems.append(f"{name}:{p} has shape {tuple(params[p].shape)}, this model needs {tuple(shape)}")
    if bad := [p for p, t in params.items() if not bool(torch.isfinite(t).all())]:
        problems.append(f"{name} holds NaN or Inf in {', '.join(bad)}")
    if not problems:
        try:
            check(spec.lower(site, params, places.weights[name]), places.weights[name], name)
        except ShapeError as error:
            problems.append(str(error))
    return problems


def _some(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
