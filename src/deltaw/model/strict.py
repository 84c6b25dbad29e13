"""A finished adapter matched with a model, strictly: every tensor consumed, every expected one present."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine, check
from deltaw.core.bottleneck import Bottleneck, check_bottleneck
from deltaw.core.misfits import broken, is_finite, misfits, some
from deltaw.core.prefix import Prefix, check_prefix
from deltaw.core.site import BlockSite, LinearSite, Site, VirtualSite
from deltaw.core.spec import Form, MethodSpec
from deltaw.core.targets import matches, select
from deltaw.errors import AdapterError, ShapeError, TargetError, near
from deltaw.model.attachment import Attachment
from deltaw.model.places import Places
from deltaw.model.replaced import owners, swapped


def strict(adapter: Adapter, places: Places, base_tensors: Mapping[str, Tensor]) -> Attachment:
    """An adapter's tensors matched with the model, each one consumed and each expected one present.

    Raises AdapterError that lists unknown places, missing parameters and wrong shapes.
    """
    spec = adapter.spec if adapter.fingerprint is not None else _as_peft_meant(adapter, places)
    problems: list[str] = []
    told: dict[str, Any] = {"fingerprint": adapter.fingerprint, "provenance": dict(adapter.provenance)}
    attachment = Attachment(spec, overrides=dict(adapter.overrides), **told)
    try:
        targeted = set(places.chosen(spec))
        swaps, owned = swapped(spec, places), owners(spec, places)
    except TargetError as error:
        targeted = {name for name, params in adapter.sites.items() if set(params) != {"bias"}}
        swaps, owned = {}, set()
        problems.append(str(error).rstrip("."))
    attachment.shared = {p: t.detach().clone() for p, t in adapter.shared.items()}
    for name, params in adapter.sites.items():
        if (site := places.find(spec, name)) is not None:
            attachment.places[name] = site
            attachment.sites[name] = {p: t.detach().clone() for p, t in params.items()}
    if not spec.shared_is_saved and attachment.places:
        attachment.shared = spec.init_shared(list(attachment.places.values()), torch.Generator().manual_seed(0))
    device = next(iter(base_tensors.values())).device
    if device.type != "meta":  # that of a base which is only read
        attachment.to(device)
    of_shared = _misfit_shared(attachment)
    problems += [*of_shared, *_changed_rows(adapter, base_tensors)]
    unknown = [name for name in adapter.sites if name not in attachment.sites]
    if unknown:
        problems.append(f"no such place in this model: {some(unknown)}.{near(unknown[0], sorted(places.sites))}")
    for name in attachment.sites:
        problems += _misfit(attachment, places, name, name in targeted, lowers=not of_shared)
    if absent := [name for name in targeted if name not in adapter.sites]:
        problems.append(f"no tensors for {some(absent)}, which its settings target")
    given = {r.tensor for r in adapter.replaced}
    biases = [
        f"{name}.bias"
        for name, site in places.sites.items()
        if spec.wants(site) and name not in targeted | owned and name not in adapter.sites
    ]
    if absent := [tensor for tensor in (*swaps, *biases) if tensor not in given]:
        problems.append(f"no tensors for {some(absent)}, which its settings replace")
    for r in adapter.replaced:
        base = base_tensors.get(r.tensor)
        if not is_finite(r.value):
            problems.append(f"{r.tensor} holds NaN or Inf")
        if base is None:
            problems.append(f"it replaces {r.tensor}, which this model does not have")
        elif r.rows is not None:
            if r.value.shape != (len(r.rows), base.shape[1]):
                problems.append(f"rows of {r.tensor} have shape {tuple(r.value.shape)}, need {base.shape[1]} columns")
            attachment.rows[r.tensor] = (torch.tensor(r.rows, dtype=torch.long), r.value.detach().clone())
        elif r.value.shape != base.shape:
            problems.append(f"{r.tensor} has shape {tuple(r.value.shape)}, this model's is {tuple(base.shape)}")
        elif r.tensor in swaps or not torch.equal(r.value.to(base), base):  # PEFT saves unchanged embeddings
            attachment.swaps[r.tensor] = r.value.detach().clone()
    if problems:
        raise AdapterError(f"The adapter does not fit this model: {some(problems, 6, '; ')}.")
    return attachment


def _as_peft_meant(adapter: Adapter, places: Places) -> MethodSpec:
    """A foreign adapter's settings where PEFT reads them differently from us.

    PEFT saves lists with names that match nothing (its #1959), two names for a classifier's one head, and
    layers_to_transform that it ignored at targets that are whole paths. No tensor can be missed by this: each must
    still find its place.
    """
    spec = adapter.spec
    saved = tuple(m for m in spec.save_modules if any(name == m or name.endswith(m) for name in places.modules))
    spec = spec.model_copy(update={"save_modules": saved}) if saved else spec
    if spec.sits != "linear":
        return spec
    if not isinstance(spec.targets, str):
        there = tuple(t for t in spec.targets if _hits((t,), places))
        spec = spec.model_copy(update={"targets": there}) if there else spec
    if spec.exclude is not None and not isinstance(spec.exclude, str):
        left = tuple(name for name in spec.exclude if _hits((name,), places))
        spec = spec.model_copy(update={"exclude": left or None})
    wanted = spec.layer_numbers()
    if wanted is not None and not isinstance(spec.targets, str):
        every = spec.model_copy(update={"layers": None})
        with suppress(TargetError):  # `strict` raises it with everything else that does not fit
            hit = select(every, list(places.sites.values()))
            meant = tuple(s.name for s in hit if s.name in spec.targets or s.layer in wanted)
            if any(name in spec.targets for name in meant):
                return every.model_copy(update={"targets": meant})
    return spec


def _hits(names: tuple[str, ...], places: Places) -> bool:
    return any(matches(names, name) for name in places.sites)


def _changed_rows(adapter: Adapter, base_tensors: Mapping[str, Tensor]) -> list[str]:
    """Rows of a foreign adapter on whose map it also has a change: PEFT adds the two, here the rows count alone."""
    said = []
    for tensor in (r.tensor for r in adapter.replaced if r.rows is not None and adapter.fingerprint is None):
        for site in (n.rpartition(".")[0] for n, t in base_tensors.items() if t is base_tensors.get(tensor)):
            if set(adapter.sites.get(site, {})) - {"bias"}:
                said.append(
                    f"it sets rows of {tensor} and changes {site}, which has them: PEFT adds the two, we cannot"
                )
    return said


def _misfit_shared(made: Attachment) -> list[str]:
    wanted = made.spec.shared_shapes(list(made.places.values())) if made.places else {}
    return [*misfits("the adapter", wanted, made.shared), *broken("the adapter", made.shared)] if made.places else []


def _misfit(made: Attachment, places: Places, name: str, targeted: bool, *, lowers: bool) -> list[str]:
    """lowers: what its places share is right, so that their forms can be made."""
    site = made.places[name]
    params = made.sites[name]
    problems = [*misfits(name, made.spec.shapes(site, targeted), params), *broken(name, params)]
    if not problems and lowers:
        try:
            check_form(made.lowered(name, places), site, places)
        except ShapeError as error:
            problems.append(str(error))
    return problems


def check_form(form: Form, site: Site, places: Places) -> None:
    """Raise ShapeError unless a normal form fits its place."""
    if isinstance(form, Affine) and isinstance(site, LinearSite):
        check(form, places.weights[site.name], site.name)
    elif isinstance(form, Bottleneck) and isinstance(site, BlockSite):
        check_bottleneck(form, site)
    elif isinstance(form, Prefix) and isinstance(site, VirtualSite):
        check_prefix(form, site)
    else:
        raise ShapeError(f"{site.name}: a {type(form).__name__} does not belong there.")
