"""An adapter at a lower rank: each place's change cut from its factors, at a stated rank or error."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec
from deltaw.errors import BadInput, NotMergeable
from deltaw.merge.as_adapter import PLACING, ranks_as_settings, refuse_out
from deltaw.merge.cuts import SiteCut, together
from deltaw.merge.deltas import fitted, lazy
from deltaw.merge.factors import Cut, Keep, cut_factors
from deltaw.methods.lora import Lora
from deltaw.methods.lowrank import LowRank
from deltaw.model.load import load_tokenizer
from deltaw.store.peft import adapter_folder, read_adapter, write_adapter


@dataclass(frozen=True)
class CompressReport:
    """What a compression wrote.

    adapter, parent   ids of the result and of what it was made from
    sites             rank before and after at each place, and the error of the cut there (merge/cuts.py)
    error             |dW - dW'| / |dW| over all places together
    n_parameters, size_bytes  of the result;  n_parameters_before, size_bytes_before: of its parent
    """

    out: str
    adapter: str
    parent: str
    sites: tuple[SiteCut, ...]
    error: float
    n_parameters: int
    n_parameters_before: int
    size_bytes: int
    size_bytes_before: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@torch.no_grad()
def compress(
    adapter: str | Path | Adapter, out: str | Path, *, rank: int | None = None, error: float | None = None
) -> CompressReport:
    """Write `adapter` at a lower rank; the base is not needed, and no dense matrix is made.

    rank    at most this rank at each place
    error   at each place the lowest rank that keeps |dW - dW'| / |dW| at or below this, in the Frobenius norm. Places
            get ranks of their own (rank_pattern, alpha_pattern); with `rank` too, whichever is lower

    Biases, replaced modules and new vocabulary stay as they are. A VeRA adapter becomes a LoRA.

    Raises BadInput, AdapterError, NotMergeable for a method whose change has no factors.
    """
    started = time.monotonic()
    if rank is None and error is None:
        raise BadInput(
            "give the rank to keep, or the error to stay below: rank=8 (--rank 8), error=0.01 (--error 0.01)."
        )
    keep = Keep(rank, error)
    refuse_out(Path(out), [adapter])
    given = adapter if isinstance(adapter, Adapter) else read_adapter(Path(adapter))
    cuts, before = _cuts(given, keep)
    sites = {n: {p: t for p, t in params.items() if p == "bias"} for n, params in given.sites.items()}
    for name, cut in cuts.items():
        sites[name] = {"A": cut.A, "B": cut.B, **sites[name]}
    noted = {k: v for k, v in given.provenance.items() if k in ("base", "base_model_name_or_path", "kind", "labels")}
    made = replace(
        given,
        spec=_spec(given.spec, {n: c.rank for n, c in cuts.items()}),
        sites=sites,
        shared={},
        provenance={**noted, "parents": [given.id], "compress": {"rank": rank, "error": error}},
    )
    path = write_adapter(made, out, _words(adapter, given.spec))
    return CompressReport(
        out=str(path),
        adapter=made.id,
        parent=given.id,
        sites=tuple(SiteCut(n, c.rank, c.norm, c.error, before[n]) for n, c in cuts.items()),
        error=together(cuts.values()),
        n_parameters=made.n_parameters,
        n_parameters_before=given.n_parameters,
        size_bytes=_tensor_bytes(made),
        size_bytes_before=_tensor_bytes(given),
        seconds=round(time.monotonic() - started, 3),
    )


def _cuts(adapter: Adapter, keep: Keep) -> tuple[dict[str, Cut], dict[str, int]]:
    """The cut change of each place that has factors, and its rank before."""
    spec = adapter.spec
    if spec.sits != "linear" or not spec.mergeable:
        raise NotMergeable(f"Method {spec.name!r} has no change of weights with a rank: there is nothing to compress.")
    made = fitted(replace(adapter, replaced=()))
    cuts: dict[str, Cut] = {}
    before: dict[str, int] = {}
    for name, site in made.places.items():
        if set(made.sites[name]) == {"bias"}:
            continue
        if not set(made.sites[name]) <= {"A", "B", "bias", "d", "b"}:
            raise NotMergeable(
                f"The change of method {spec.name!r} has gains, so that it is dense. Make a LoRA of it: deltaw combine "
                "--adapter ... --base ... --method svd --rank ..."
            )
        assert isinstance(site, LinearSite)  # as `sits` said
        form = spec.lower(site, made.at(name), lazy(site))
        assert isinstance(form, Affine)
        assert form.A is not None
        assert form.B is not None
        cuts[name] = cut_factors((form.A, form.scale * form.B.double()), keep, name)
        before[name] = form.A.shape[0]
        if cuts[name].rank >= before[name]:  # nothing is gained by other factors of the same size
            cuts[name] = Cut(form.A.float(), form.scale * form.B.float(), 0.0, cuts[name].norm)
    if not cuts:
        raise NotMergeable(f"Method {spec.name!r} has no factors: there is nothing to compress.")
    return cuts, before


def _spec(spec: MethodSpec, ranks: dict[str, int]) -> MethodSpec:
    settings = ranks_as_settings(ranks)
    if isinstance(spec, LowRank):
        return type(spec)(**{**spec.model_dump(), **settings})
    kept = {key: getattr(spec, key) for key in (*PLACING, "save_modules", "new_tokens")}
    return Lora(**settings, **kept)


def _words(adapter: str | Path | Adapter, spec: MethodSpec) -> Any:
    """The tokenizer that lies beside an adapter with new tokens, for PEFT; None where there is none."""
    if isinstance(adapter, Adapter) or not spec.new_tokens:
        return None
    folder = adapter_folder(adapter)
    return load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _tensor_bytes(adapter: Adapter) -> int:
    return sum(t.numel() * t.element_size() for t in adapter.tensors().values())
