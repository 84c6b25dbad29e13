"""deltaw extract: a full fine-tune minus its base, as an adapter."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def extract(
    base: Annotated[str, typer.Option(help="A folder, a hub id, a .gguf file or a starter name.")],
    tuned: Annotated[str, typer.Option(help="The model that was fine-tuned from it, in the same ways.")],
    out: Annotated[str, typer.Option(help="Where the adapter goes.")],
    rank: Annotated[int | None, typer.Option(help="At most this rank at each linear map.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="The lowest rank at each map that keeps this share of |dW| squared, as 0.9.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write what a full fine-tune changed as a LoRA adapter, and say what is lost at each layer."""
    from deltaw.merge.extract import extract as run

    report = run(base, tuned, out, rank=rank, energy=energy, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        typer.echo(
            f"{report.out}: {report.tuned} - {report.base}; relative error {report.error:.3g} over {len(report.sites)} "
            f"linear maps; kept whole: {len(report.replaced)} tensors and {len(report.biases)} biases; "
            f"{report.n_parameters:,} parameters, {report.size_bytes / 1e6:,.1f} MB; {report.seconds:.1f} s"
        )
