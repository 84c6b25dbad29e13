"""Each place of an adapter measured: its update's spectrum and norm, its weight's norm, what rounding leaves.

Without a base, what needs none: products of factors (LoRA, rsLoRA, VeRA). With one, everything that a plain weight can
hold; tensors are read from the files one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine, merged
from deltaw.core.site import LinearSite
from deltaw.core.weight import Weight
from deltaw.diagnose.precision import Rounded, Rounding, left_after, rounded, rounding
from deltaw.diagnose.spectrum import Spectrum, dense_values, factor_values, summarise
from deltaw.errors import AdapterError, BadInput
from deltaw.merge.checkpoint import FLOATS
from deltaw.merge.rounded import RoundedCheckpoint
from deltaw.merge.source import Source


@dataclass(frozen=True)
class SiteRow:
    """One linear map that the adapter changes.

    rank, scale   that the update was given; None where it is no product of factors
    spectrum      singular values of the update dW = W' - W
    update_norm   Frobenius norm of dW;  weight_norm: of W; None without a base
    bias_moved    norm of the change of the bias; None where it does not train or there is no base
    reach         how far one step of Adam at rate 1 can turn W: scale * |A|_F over the mean norm of W's rows. Each
                  number of B moves by about the rate (arXiv:1412.6980, section 2.1), so a row of B A by rate * |A|_F
    rounded       by name of a number format: what is left of dW when W' is written in it
    """

    name: str
    role: str
    layer: int | None
    shape: tuple[int, int]
    rank: int | None
    scale: float | None
    spectrum: Spectrum | None
    update_norm: float
    weight_norm: float | None
    bias_moved: float | None
    reach: float | None
    rounded: dict[str, Rounded]

    @property
    def ratio(self) -> float | None:
        """Update norm over weight norm; None without a base."""
        return self.update_norm / self.weight_norm if self.weight_norm else None

    def plain(self) -> dict[str, Any]:
        """The row as plain data for JSON."""
        parts = {k: v for k, v in asdict(self).items() if k not in ("spectrum", "rounded")}
        shares = {n: {"kept": r.kept, "error": r.error, "lost": r.lost} for n, r in self.rounded.items()}
        spectrum = None if self.spectrum is None else asdict(self.spectrum)
        return {**parts, "ratio": self.ratio, "spectrum": spectrum, "rounded": shares}


class _NeedsBase(Exception):
    """A method asked for the base's weights where there are none."""


class _NoWeight:
    """Stands where a base's weight would be: its shape is known, whoever asks for more is told that there is none."""

    def __init__(self, site: LinearSite) -> None:
        self.in_features, self.out_features = site.in_features, site.out_features

    def __getattr__(self, name: str) -> Any:
        raise _NeedsBase(name)


@torch.no_grad()
def measure_alone(adapter: Adapter) -> tuple[list[SiteRow], list[str]]:
    """Rows of the places that can be measured without a base, and the names of the other ones."""
    rows, others = [], []
    shared = dict(adapter.shared)
    if not adapter.spec.shared_is_saved:
        shared = adapter.spec.init_shared(list(adapter.places), torch.Generator().manual_seed(0))
    for place in adapter.places:
        params = adapter.sites[place.name]
        try:
            if not isinstance(place, LinearSite) or not all(bool(torch.isfinite(t).all()) for t in params.values()):
                raise _NeedsBase(place.name)
            form = adapter.spec.lower(place, {**shared, **params}, cast(Weight, _NoWeight(place)))
            if not isinstance(form, Affine) or not form.is_low_rank_only or form.A is None or form.B is None:
                raise _NeedsBase(place.name)
        except _NeedsBase:
            others.append(place.name)
            continue
        spectrum = summarise(factor_values(form.A, form.B, form.scale))
        rows.append(_row(place, form, spectrum, spectrum.norm, None, None, {}))
    return rows, others


@torch.no_grad()
def measure_on(
    adapter: Adapter, source: Source, formats: dict[str, Rounding], merged_into: Source | None = None
) -> list[SiteRow]:
    """Rows of every linear map that the adapter changes, with the base's weights.

    formats      by name, what the merged weights would be rounded to
    merged_into  a model that this adapter was merged into: what is left there is added as "written"

    Raises AdapterError where the adapter does not fit the base.
    """
    made, places = source.match(adapter)
    written, as_written = _written(adapter, merged_into)
    rows = []
    for name, place in made.places.items():
        form = made.lowered(name, places)
        if not isinstance(place, LinearSite) or not isinstance(form, Affine):
            continue
        bias, moved = places.biases.get(name), None
        if form.bias is not None and bias is not None:
            moved = float((form.bias.double() - bias.double()).norm())
        if form.A is None and form.is_low_rank_only:  # only its bias trains
            rows.append(_row(place, form, None, 0.0, None, moved, {}))
            continue
        w = places.weights[name].dense(torch.float32)
        after, _ = merged(form, w)
        if form.is_low_rank_only and form.A is not None and form.B is not None:
            spectrum = summarise(factor_values(form.A, form.B, form.scale))
        else:
            spectrum = summarise(dense_values(after - w))
        left = {f: rounded(w, after, how) for f, how in formats.items()}
        if written is not None:
            now = written[name].dense(torch.float32)
            if now.shape != w.shape:
                raise BadInput(f"{name} is {tuple(now.shape)} in the merged model and {tuple(w.shape)} in the base.")
            left["written"] = left_after(w, after, as_written(w), now)
        rows.append(_row(place, form, spectrum, spectrum.norm, w, moved, left))
    return rows


def _written(adapter: Adapter, into: Source | None) -> tuple[Mapping[str, Weight] | None, Rounding]:
    """The weights of a merged model, and how they are rounded."""
    if into is None:
        return None, rounding("float32")
    checkpoint = into.checkpoint
    try:
        weights = into.match(adapter)[1].weights
    except AdapterError as problem:
        raise BadInput(f"{into.folder} is no model that this adapter was merged into. {problem}") from None
    if isinstance(checkpoint, RoundedCheckpoint):
        return weights, rounding(str(checkpoint.how))
    dtypes = {FLOATS[e.dtype] for e in checkpoint.entries.values() if e.dtype in FLOATS}
    coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
    return weights, lambda w: w.to(coarsest).float()


def _row(
    place: LinearSite,
    form: Affine,
    spectrum: Spectrum | None,
    norm: float,
    weight: Tensor | None,
    moved: float | None,
    left: dict[str, Rounded],
) -> SiteRow:
    low = form.A is not None
    size = None if weight is None else float(weight.double().norm())
    reach = None
    if form.A is not None and size and form.is_low_rank_only:
        reach = abs(form.scale) * float(form.A.double().norm()) / (size / place.out_features**0.5)
    return SiteRow(
        name=place.name,
        role=place.role,
        layer=place.layer,
        shape=(place.out_features, place.in_features),
        rank=form.A.shape[0] if form.A is not None else None,
        scale=form.scale if low else None,
        spectrum=spectrum,
        update_norm=norm,
        weight_norm=size,
        bias_moved=moved,
        reach=reach,
        rounded=left,
    )


def total(rows: Sequence[SiteRow], name: str) -> Rounded | None:
    """What rounding to `name` leaves over all rows; None where it was not measured."""
    found = [r.rounded[name] for r in rows if name in r.rounded]
    return sum(found, Rounded()) if found else None
