"""Several adapters become one: an adapter, or a base with their sum written in. Exact against dense arithmetic."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.fingerprint import BaseFingerprint, fingerprint_folder
from deltaw.core.spec import MethodSpec
from deltaw.errors import BadInput, BaseMismatch, NotMergeable
from deltaw.merge.as_adapter import PLACING, Change, Home, adapter_of, refuse_out
from deltaw.merge.changes import Change as Rewritten
from deltaw.merge.checkpoint import SHARD_BYTES, Checkpoint
from deltaw.merge.cuts import SiteCut, together
from deltaw.merge.deltas import Deltas, Part, fitted, same_sizes
from deltaw.merge.factors import Cut, Keep, cut_dense, cut_factors, joined, whole
from deltaw.merge.source import Source
from deltaw.merge.sums import LOW_RANK, Way, total
from deltaw.merge.write import Tally, refuse_used, write_beside, write_config, write_weights
from deltaw.model.identity import OtherBaseWarning, compare
from deltaw.model.kinds import fresh_tensors, head_config
from deltaw.model.load import DTYPES, folder_format, resolve_base
from deltaw.store.files import whole_folder
from deltaw.store.peft import read_adapter, write_adapter


@dataclass(frozen=True)
class CombineReport:
    """What a combination wrote.

    into       "adapter" or "base"
    adapter    the id of the adapter that was written; None for a base
    parents    ids of the adapters, in the order given, with their `weights`
    sites      each linear map of the written adapter;  error: of all together, 0 when nothing was cut
    n_parameters  of a written adapter
    n_tensors_changed, lost_share, largest_change, untied, dtype  of a written base, as in a merge's report
    """

    out: str
    into: str
    method: str
    adapter: str | None
    base: str | None
    parents: tuple[str, ...]
    weights: tuple[float, ...]
    density: float | None
    rank: int | None
    sites: tuple[SiteCut, ...]
    error: float
    n_parameters: int | None
    n_tensors_changed: int | None
    lost_share: float | None
    largest_change: float | None
    untied: bool | None
    dtype: str | None
    size_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def combine(
    adapters: Sequence[str | Path | Adapter],
    weights: Sequence[float] | None = None,
    *,
    method: str = "linear",
    out: str | Path | None = None,
    into_base: str | Path | None = None,
    base: str | Path | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    shared_mask: bool = False,
    dtype: str | None = None,
    allow_other_base: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> CombineReport:
    """Sum the changes of several adapters, of any rank, scale and method that lowers to an Affine.

    weights      one an adapter, negative ones too; None: 1 each
    method       a way of merge/sums.py: "linear"; "cat" (linear, of low-rank changes only, kept whole); "svd" (linear,
                 cut to `rank`); "ties", "dare_linear", "dare_ties", "magnitude"
    out          a folder for the result as a LoRA adapter. Low-rank sums are exact at the sum of the ranks unless
                 `rank` cuts them; dense ones (the last four methods, and DoRA's and IA3's changes) need `rank`
    into_base    instead of `out`: a folder for the base with the exact sum written in, shard by shard
    base         what the adapters were trained on; needed for `into_base`, gains, biases and replaced modules
    rank         at most this many singular values a place
    density, seed, shared_mask  as in merge/sums.py
    dtype        of the written base; None: what each of its tensors has

    Raises BadInput, AdapterError, BaseMismatch (of the base, or of one another), ShapeError, NotMergeable for what has
    no sum, RunError (`into_base` holds something), WorkFailed (a sum that is not finite, a full disk).
    """
    started = time.monotonic()
    way = Way(method, density, seed, shared_mask)
    if (out is None) == (into_base is None):
        raise BadInput("give out, for an adapter, or into_base, for a merged base: one of the two.")
    job = _Job.read(adapters, weights, way, Keep(rank), allow_other_base)
    job.refuse_mixed_up(into_base is not None, base is not None, dtype)
    if into_base is None:
        assert out is not None
        refuse_out(Path(out), adapters)
        with _opened(base, job) as (deltas, source, found):
            cuts, made = job.as_lora(deltas, found)
        path = write_adapter(made, out)
        return job.report(path, found, time.monotonic() - started, cuts, made=made)
    refuse_used(Path(into_base))
    with _opened(base, job) as (deltas, source, found):
        assert source is not None
        assert found is not None
        tally = _write_base(Path(into_base), source, job.rewritten(deltas), dtype, found, job.adapters[0], shard_bytes)
    return job.report(Path(into_base), found, time.monotonic() - started, {}, tally=tally, dtype=dtype or found.dtype)


@contextmanager
def _opened(base: str | Path | None, job: _Job) -> Iterator[tuple[Deltas, Source | None, BaseFingerprint | None]]:
    """The changes of the adapters on the base, which is compared with each of them; or among themselves."""
    used = [(i, w, job.adapters[i]) for i, w in enumerate(job.weights) if w != 0]
    if base is None:
        known = job.compare_with_another()
        parts = [Part(i, w, fitted(a)) for i, w, a in used]
        same_sizes(parts)
        yield Deltas(parts, None, None), None, known
        return
    folder = resolve_base(base)
    if (saved := folder_format(folder)) is not None:
        raise NotMergeable(f"{folder} holds {saved.name} weights: give the 16- or 32-bit model that it was made from.")
    found = fingerprint_folder(folder)
    for adapter in job.adapters:
        compare(adapter.fingerprint, found, job.allow_other_base)
    with Checkpoint(folder) as checkpoint:
        source = Source(folder, checkpoint, job.adapters, found.dtype)
        _refuse_made_up(source, job.adapters)
        matched = [(i, w, *source.match(a)) for i, w, a in used]
        yield Deltas([Part(i, w, m) for i, w, m, _ in matched], source, matched[0][3]), source, found


@dataclass(frozen=True)
class _Job:
    """A combination whose adapters are read and can be summed."""

    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]
    way: Way
    keep: Keep
    allow_other_base: bool

    @classmethod
    def read(
        cls,
        given: Sequence[str | Path | Adapter],
        weights: Sequence[float] | None,
        way: Way,
        keep: Keep,
        allow_other_base: bool,
    ) -> _Job:
        if isinstance(given, str | Path | Adapter) or not given:
            raise BadInput("give a list of adapters, one at least.")
        weights = [1.0] * len(given) if weights is None else [float(w) for w in weights]
        if len(weights) != len(given):
            raise BadInput(f"{len(given)} adapters and {len(weights)} weights: give one weight an adapter, or none.")
        if not all(math.isfinite(w) for w in weights):
            raise BadInput(f"weights are {weights}; they must be finite numbers.")
        if not any(weights):
            raise BadInput("every weight is 0: the result would be the base itself.")
        adapters = tuple(a if isinstance(a, Adapter) else read_adapter(Path(a)) for a in given)
        for number, adapter in enumerate(adapters, 1):
            _refuse_unsummable(number, adapter)
        for what, of in (("positions of the base", "overrides"), ("labels", "provenance")):
            found = [a.overrides if of == "overrides" else a.provenance.get("labels") for a in adapters]
            if any(f != found[0] for f in found):
                raise NotMergeable(f"The adapters want different {what}: there is no sum of them.")
        return cls(adapters, tuple(weights), way, keep, allow_other_base)

    def refuse_mixed_up(self, into_base: bool, has_base: bool, dtype: str | None) -> None:
        """Raise BadInput for arguments that would be ignored, or are missing."""
        rank = self.keep.rank
        if into_base and not has_base:
            raise BadInput("into_base writes a merged base: give the base too (--base).")
        if into_base and rank is not None:
            raise BadInput("a merged base holds the sum as it is: remove rank, or write an adapter (out).")
        if dtype is not None and not into_base:
            raise BadInput("dtype is of a merged base: adapters are float32.")
        if dtype is not None and dtype not in DTYPES:
            raise BadInput(f"unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
        if self.way.name == "cat" and rank is not None:
            raise BadInput("method 'cat' keeps every rank: remove rank, or take method 'svd'.")
        if self.way.name == "svd" and (rank is None or into_base):
            raise BadInput("method 'svd' cuts a sum to a rank, in an adapter: give rank and out, or take 'linear'.")

    def compare_with_another(self) -> BaseFingerprint | None:
        """The base that the adapters say; BaseMismatch where they say two, a warning where none says one."""
        told = [(n, a.fingerprint) for n, a in enumerate(self.adapters, 1) if a.fingerprint is not None]
        if not told:
            what = "None of the adapters says which base it was trained on: unknown, not checked."
            warnings.warn(what, OtherBaseWarning, stacklevel=4)
            return None
        first, known = told[0]
        for number, adapter in enumerate(self.adapters, 1):
            try:
                compare(adapter.fingerprint, known, self.allow_other_base)
            except BaseMismatch as problem:
                raise BaseMismatch(f"Adapter {number} does not go with adapter {first}: {problem}") from None
        return known

    # As an adapter -------------------------------------------------------------------------------

    def as_lora(self, deltas: Deltas, found: BaseFingerprint | None) -> tuple[dict[str, Cut], Adapter]:
        """The sum as LoRA, and how each of its linear maps was cut."""
        owners = {n.rpartition(".")[0] for n in deltas.swapped}
        change = Change()
        for tensor in deltas.swapped:
            change.replaced[tensor] = self.changed(deltas, tensor)
        for name in deltas.sites:
            inside = any(name == o or name.startswith(o + ".") for o in owners)
            if deltas.changes_weight(name) and f"{name}.weight" not in change.replaced:
                if inside:
                    change.replaced[f"{name}.weight"] = self.changed(deltas, f"{name}.weight")
                else:
                    change.maps[name] = self.cut(deltas, name)
            if f"{name}.bias" not in change.replaced and deltas.changes_bias(name):
                bias = self.changed(deltas, f"{name}.bias")
                (change.replaced if inside else change.biases)[f"{name}.bias" if inside else name] = bias
        own = next((a.fingerprint for a in self.adapters if a.fingerprint is not None), found)
        sites = deltas.sites if deltas.places is None else deltas.places.sites
        read = None if deltas.source is None else deltas.read
        home = Home(sites, self.placings(deltas), own, deltas.places, read)
        made = adapter_of(change, home, self.adapters[0].overrides, self.provenance())
        return change.maps, made

    def cut(self, deltas: Deltas, name: str) -> Cut:
        """The factors of the sum at one linear map: exact where every change there is low-rank and no rank is asked."""
        factors = deltas.factors(name)
        if factors is not None and self.way.name in LOW_RANK:
            A, B = joined(factors)
            small = self.keep.rank is None or A.shape[0] <= self.keep.rank
            return whole((A, B), name) if small else cut_factors((A, B), self.keep, name)
        why = f"The sum is dense at {name}"
        if self.way.name == "cat":
            raise NotMergeable(f"{why}: gains (DoRA, IA3) have no factors to put side by side. Take method 'svd'.")
        if self.keep.rank is None:
            raise BadInput(f"{why}: give the rank to keep of it, or write it into a base (into_base, --into-base).")
        delta = self.total(deltas.of(f"{name}.weight"), f"{name}.weight")
        return cut_dense(delta if deltas.sites[name].kind == "linear" else delta.T, self.keep, name)

    def changed(self, deltas: Deltas, tensor: str) -> Tensor:
        """A tensor of the base with the sum added, float32."""
        return (deltas.read(tensor).double() + self.total(deltas.of(tensor), tensor)).float()

    def total(self, moved: list[tuple[int, float, Tensor]], tensor: str) -> Tensor:
        return total(moved, self.way, tensor)

    def placings(self, deltas: Deltas) -> list[dict[str, Any]]:
        """How the adapters name their places, where all do it alike and mean the same."""
        own = [{key: getattr(a.spec, key) for key in PLACING} for a in self.adapters]
        words = any(type(a.spec).choose is not MethodSpec.choose for a in self.adapters)  # only their method knows them
        alike = all(o == own[0] for o in own) and not words
        if deltas.places is None:
            known = all(a.fingerprint is not None for a in self.adapters)
            alike = alike and known and all(set(a.sites) == set(deltas.sites) for a in self.adapters)
        return [own[0]] if alike else []

    def provenance(self) -> dict[str, Any]:
        """Where the result comes from."""
        first = self.adapters[0].provenance
        names = ("base", "base_model_name_or_path", "kind", "labels")
        kept: dict[str, Any] = {k: first[k] for k in names if k in first}
        how = {**asdict(self.way), "rank": self.keep.rank, "weights": list(self.weights)}
        return {**kept, "parents": [a.id for a in self.adapters], "combine": {"method": how.pop("name"), **how}}

    # Into a base ---------------------------------------------------------------------------------

    def rewritten(self, deltas: Deltas) -> dict[str, Rewritten]:
        """What happens to each tensor of the base; nothing is computed before it is written."""
        names = [*deltas.swapped]
        for site in deltas.sites:
            names += [f"{site}.weight"] if deltas.changes_weight(site) else []
            names += [f"{site}.bias"] if deltas.changes_bias(site) else []

        def later(tensor: str) -> Rewritten:
            return Rewritten(add=lambda: self.total(deltas.of(tensor), tensor))

        return {name: later(name) for name in dict.fromkeys(names)}

    def report(
        self,
        out: Path,
        found: BaseFingerprint | None,
        seconds: float,
        cuts: dict[str, Cut],
        made: Adapter | None = None,
        tally: Tally | None = None,
        dtype: str | None = None,
    ) -> CombineReport:
        """What was done."""
        folder = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        return CombineReport(
            out=str(out),
            into="base" if made is None else "adapter",
            method=self.way.name,
            adapter=None if made is None else made.id,
            base=None if found is None else found.short(),
            parents=tuple(a.id for a in self.adapters),
            weights=self.weights,
            density=self.way.density,
            rank=self.keep.rank,
            sites=tuple(SiteCut(n, c.rank, c.norm, c.error) for n, c in cuts.items()),
            error=together(cuts.values()),
            n_tensors_changed=None if tally is None else tally.n_tensors_changed,
            n_parameters=None if made is None else made.n_parameters,
            lost_share=None if tally is None else tally.n_lost / max(tally.n_changed, 1),
            largest_change=None if tally is None else tally.largest,
            untied=None if tally is None else tally.untied,
            dtype=dtype,
            size_bytes=folder,
            seconds=round(seconds, 3),
        )


def _refuse_unsummable(number: int, adapter: Adapter) -> None:
    spec = adapter.spec
    what = f"Adapter {number} (method {spec.name!r})"
    if spec.sits != "linear" or not spec.mergeable:
        raise NotMergeable(f"{what} is no change of weights: it cannot be summed with others.")
    if spec.new_tokens or any(r.rows is not None for r in adapter.replaced):
        raise NotMergeable(f"{what} has rows of vocabulary of its own: there is no sum of them with others.")


def _refuse_made_up(source: Source, adapters: Sequence[Adapter]) -> None:
    """Raise NotMergeable where an adapter replaces what the base's files do not hold: a head drawn by chance."""
    drawn = {n for a in adapters for r in a.replaced if (n := r.tensor) in fresh_tensors(source.net)}
    if drawn:
        raise NotMergeable(
            f"The adapters replace {min(drawn)}, which the base's files do not hold: there is no change to sum."
        )


def _write_base(
    out: Path,
    source: Source,
    changes: dict[str, Rewritten],
    dtype: str | None,
    found: BaseFingerprint,
    first: Adapter,
    shard_bytes: int,
) -> Tally:
    with whole_folder(out) as aside:
        tally = write_weights(source, changes, aside, DTYPES[dtype] if dtype else None, shard_bytes)
        tied = False if (tally.untied or source.contradicts_tie) and source.kind != "seq2seq" else None
        write_config(
            source.folder,
            aside,
            dtype=dtype or found.dtype,
            tied=tied,
            vocab_size=None,
            overrides={**first.overrides, **head_config(source.net)},
        )
        write_beside(source.folder, aside, None)
        refuse_used(out)  # by another process, in the meantime
    return tally
