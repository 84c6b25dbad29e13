"""deltaw compress: an adapter at a lower rank."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.references import RegistryOption, adapter_path

if TYPE_CHECKING:
    from deltaw.merge.cuts import SiteCut


def compress(
    adapter: Annotated[str, typer.Option(help="Folder of an adapter or of a run, or NAME[@V] in the registry.")],
    out: Annotated[str, typer.Option(help="Where the smaller adapter goes.")],
    rank: Annotated[int | None, typer.Option(help="At most this rank at each place.")] = None,
    error: Annotated[
        float | None, typer.Option(help="The lowest rank at each place that keeps |dW - dW'| / |dW| at or below this.")
    ] = None,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write an adapter at a lower rank, from its factors alone, and say what is lost at each place."""
    from deltaw.merge.compress import compress as run

    report = run(adapter_path(adapter, registry), out, rank=rank, error=error)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
        return
    print_cuts(report.sites)
    typer.echo(
        f"{report.out}: relative error {report.error:.3g}; {report.n_parameters_before:,} parameters became "
        f"{report.n_parameters:,}, {report.size_bytes_before / 1e6:,.2f} MB became {report.size_bytes / 1e6:,.2f} MB; "
        f"{report.seconds:.1f} s"
    )


def print_cuts(sites: Iterable[SiteCut]) -> None:
    """One line for each place where something was lost."""
    for cut in (c for c in sites if c.error > 0):
        before = "" if cut.rank_before is None else f" of {cut.rank_before}"
        typer.echo(f"{cut.site}: rank {cut.rank}{before}, relative error {cut.error:.3g}")
