"""What several adapters change in one base, tensor by tensor: dW = W' - W in float64, or its factors.

Every method that lowers to an Affine comes down to dW and db here, so that how they are summed (merge/sums.py) knows no
method. A change with gains (DoRA, IA3) depends on W: it is made from the base's own tensor each time it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine, merged
from deltaw.core.misfits import broken, misfits, some
from deltaw.core.site import LinearSite
from deltaw.errors import AdapterError, BadInput, NotMergeable, ShapeError
from deltaw.merge.checkpoint import StoredWeight
from deltaw.merge.factors import Factors
from deltaw.merge.source import Source
from deltaw.model.attachment import Attachment
from deltaw.model.places import Places


@dataclass(frozen=True)
class Part:
    """One adapter of a sum: its number among those given, its weight, and what it holds, fitted to the base."""

    number: int
    weight: float
    made: Attachment


class Deltas:
    """The changes of several adapters.

    parts   the adapters
    sites   every linear map that one of them changes, by name, in the model's order
    places  the base's; None: no base was given, and every change must be low-rank
    """

    def __init__(self, parts: Sequence[Part], source: Source | None, places: Places | None) -> None:
        self.parts, self.source, self.places = parts, source, places
        touched: dict[str, LinearSite] = {
            n: s for p in parts for n, s in p.made.places.items() if isinstance(s, LinearSite)
        }
        order = touched if places is None else [n for n in places.sites if n in touched]
        self.sites = {n: touched[n] for n in order}

    @property
    def swapped(self) -> list[str]:
        """The tensors that an adapter replaces whole, by the network's names."""
        return sorted({name for p in self.parts for name in p.made.swaps})

    def read(self, tensor: str) -> Tensor:
        """A tensor of the base, as it is stored. Raises BadInput when there is no base."""
        if self.source is None:
            raise BadInput(
                f"What the adapters change at {tensor} depends on the base (gains as DoRA's and IA3's, biases, "
                "replaced modules): give the base too (--base)."
            )
        return self.source.read(tensor)

    def changes_weight(self, site: str) -> bool:
        """Whether some adapter changes the matrix there, not only its bias."""
        return any(set(p.made.sites.get(site, {})) - {"bias"} for p in self.parts)

    def changes_bias(self, site: str) -> bool:
        """Whether some adapter changes the bias there. Raises NotMergeable where the base has none."""
        has = self.sites[site].has_bias
        if not has and (adds := [p for p in self.parts if "bias" in p.made.sites.get(site, {})]):
            raise NotMergeable(
                f"Adapter {adds[0].number + 1} adds a bias at {site}, where the base has none: a plain model cannot."
            )
        return has and any(form.bias is not None for _, form in self._forms(site))

    def factors(self, site: str) -> list[tuple[float, Factors]] | None:
        """The change of the matrix as weighted factors, an adapter each; None where one of them is dense."""
        found: list[tuple[float, Factors]] = []
        if f"{site}.weight" in self.swapped:
            return None
        for part, form in self._forms(site):
            if not form.is_low_rank_only:
                return None
            if form.A is not None and form.B is not None:
                found.append((part.weight * form.scale, (form.A, form.B)))
        return found

    def of(self, tensor: str) -> list[tuple[int, float, Tensor]]:
        """What each adapter that touches a tensor adds to it: number, weight, change as stored, float64."""
        site, _, leaf = tensor.rpartition(".")
        found = [
            (p.number, p.weight, p.made.swaps[tensor].double() - self.read(tensor).double())
            for p in self.parts
            if tensor in p.made.swaps
        ]
        if site in self.sites and leaf in ("weight", "bias"):
            found += [
                (part.number, part.weight, delta)
                for part, form in self._forms(site)
                if (delta := self._delta(site, leaf, form)) is not None
            ]
        return sorted(found, key=lambda item: item[0])

    def _delta(self, site: str, leaf: str, form: Affine) -> Tensor | None:
        place = self.sites[site]
        if leaf == "bias":
            return None if form.bias is None else form.bias - self.read(f"{site}.bias").double()
        if form.is_low_rank_only:
            if form.A is None or form.B is None:
                return None
            delta = form.scale * (form.B @ form.A)
        else:
            W = self.weight(site)
            delta = merged(form, W)[0] - W
        return delta if place.kind == "linear" else delta.T

    def weight(self, site: str) -> Tensor:
        """The base's matrix [out, in] in float64."""
        stored = self.read(f"{site}.weight").double()
        return stored if self.sites[site].kind == "linear" else stored.T

    def _forms(self, site: str) -> list[tuple[Part, Affine]]:
        """The normal form of each adapter that has parameters there, in float64."""
        place = self.sites[site]
        weight = lazy(place, lambda: self.read(f"{site}.weight").double())
        known = self.source is not None and place.has_bias
        bias = self.read(f"{site}.bias").double() if known else None
        found = []
        for part in (p for p in self.parts if site in p.made.sites):
            params = {name: t.double() for name, t in part.made.at(site).items()}
            form = part.made.spec.lower(part.made.places[site], params, weight, bias)
            assert isinstance(form, Affine)
            if self.source is None and (form.bias is not None or not form.is_low_rank_only):
                self.read(f"{site}.bias" if form.bias is not None else f"{site}.weight")
            found.append((part, form))
        return found


def lazy(site: LinearSite, read: Callable[[], Tensor] | None = None) -> StoredWeight:
    """The base's matrix at a site, read when it is needed; with no `read` only its size is known."""
    n_out, n_in = site.out_features, site.in_features
    plain = site.kind == "linear"

    def unknown() -> Tensor:
        raise BadInput(f"The change at {site.name} depends on the base's matrix: give the base too (--base).")

    return StoredWeight((n_out, n_in) if plain else (n_in, n_out), not plain, read or unknown)


def fitted(adapter: Adapter) -> Attachment:
    """An adapter by itself, with no base to fit it to. Raises AdapterError for tensors that its settings do not say,
    NaN or Inf; BadInput where a base is needed."""
    spec = adapter.spec
    if adapter.replaced:
        raise BadInput(
            f"The adapter replaces {adapter.replaced[0].tensor}: a sum with others depends on the base. "
            "Give the base too (--base)."
        )
    made = Attachment(spec, dict(adapter.sites), {p.name: p for p in adapter.places}, dict(adapter.shared))
    if not spec.shared_is_saved:
        made.shared = spec.init_shared(list(adapter.places), torch.Generator().manual_seed(0))
    problems = misfits("the adapter", spec.shared_shapes(adapter.places), made.shared)
    problems += broken("the adapter", made.shared)
    for site in adapter.places:
        assert isinstance(site, LinearSite)
        if 0 in (site.in_features, site.out_features):
            raise BadInput(
                f"The adapter's files do not say how large {site.name} is: combine it, alone or with others, and give "
                "its base too (--base)."
            )
        params = adapter.sites[site.name]
        problems += misfits(site.name, spec.shapes(site, set(params) != {"bias"}), params)
        problems += broken(site.name, params)
    if problems:
        raise AdapterError(f"The adapter is broken: {some(problems, 6, '; ')}.")
    return made


def same_sizes(parts: Sequence[Part]) -> None:
    """Raise ShapeError where two adapters hold changes of different shapes at one place."""
    first: dict[str, LinearSite] = {}
    for part in parts:
        for name, site in part.made.places.items():
            assert isinstance(site, LinearSite)
            known = first.setdefault(name, site)
            mine, other = (f"{s.out_features} x {s.in_features}" for s in (site, known))
            if mine != other:
                raise ShapeError(
                    f"Adapter {part.number + 1} changes a matrix of {mine} at {name}, another one of {other}: they "
                    "belong to different bases."
                )
