"""deltaw combine: several adapters become one, or a base with their sum written in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.compress import print_cuts
from deltaw.cli.references import RegistryOption, adapter_path

if TYPE_CHECKING:
    from deltaw.merge.combine import CombineReport


def combine(
    adapter: Annotated[
        list[str], typer.Option(help="Folder of an adapter or of a run, or NAME[@V] in the registry; once for each.")
    ],
    weight: Annotated[
        list[float] | None, typer.Option(help="Its weight, in the same order; negative takes away. By default 1 each.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="linear: the weighted sum. cat: the same, of low-rank changes only. svd: the same, cut to --rank. "
            "ties, dare_linear, dare_ties, magnitude: of a --density of each adapter's numbers."
        ),
    ] = "linear",
    out: Annotated[str | None, typer.Option(help="Where the result goes as a LoRA adapter.")] = None,
    into_base: Annotated[
        str | None,
        typer.Option(help="Instead of --out: where the base with the sum goes, a new or empty folder."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="What they were trained on: for --into-base, gains, biases, whole modules."),
    ] = None,
    rank: Annotated[int | None, typer.Option(help="At most this rank at each place; what is lost is said.")] = None,
    density: Annotated[float | None, typer.Option(help="The share of each adapter's numbers that is kept.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what DARE drops; 0 by default.")] = None,
    shared_mask: Annotated[
        bool, typer.Option("--shared-mask", help="DARE drops the same places of every adapter.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of --into-base: float32, bfloat16 or float16; by default what the base has.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Combine although the adapters come from different bases.")
    ] = False,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sum the changes of several adapters, of any rank, scale and method, with weights."""
    from deltaw.merge.combine import combine as run

    report = run(
        [adapter_path(one, registry) for one in adapter],
        weight or None,
        method=method,
        out=out,
        into_base=into_base,
        base=base,
        rank=rank,
        density=density,
        seed=seed,
        shared_mask=shared_mask,
        dtype=dtype,
        allow_other_base=allow_other_base,
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        _print(report)


def _print(report: CombineReport) -> None:
    parents = " + ".join(f"{w:g} x {p[:12]}" for w, p in zip(report.weights, report.parents, strict=True))
    if report.into == "base":
        typer.echo(
            f"{report.out}: {report.base} + {report.method} of {parents}; {report.n_tensors_changed} tensors changed, "
            f"by at most {report.largest_change:.3g} a weight; {report.lost_share:.2%} of changes rounded away in "
            f"{report.dtype}; {report.size_bytes / 1e6:,.1f} MB; {report.seconds:.1f} s"
        )
        return
    print_cuts(report.sites)
    typer.echo(
        f"{report.out}: {report.method} of {parents}; relative error {report.error:.3g}; {report.n_parameters:,} "
        f"parameters, {report.size_bytes / 1e6:,.1f} MB; {report.seconds:.1f} s"
    )
