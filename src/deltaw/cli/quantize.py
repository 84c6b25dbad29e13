"""deltaw quantize: write a base with its linear maps in 4 or 8 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def quantize(
    base: Annotated[str, typer.Option(help="A folder, a hub id, a .gguf file or a starter name; not quantised yet.")],
    out: Annotated[str, typer.Option(help="Where the quantised base goes: a new or empty folder.")],
    format: Annotated[str, typer.Option(help="nf4, fp4, int4 or int8.")] = "nf4",
    block: Annotated[int, typer.Option(help="Values that share a scale: a power of two from 32 to 4096.")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Keep the scales in 8 bits too.")] = False,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Text to choose the codes for (rows, or a .txt file), where the nearest levels are not enough."
        ),
    ] = None,
    calibrate_tokens: Annotated[int | None, typer.Option(min=1, help="Most of that text to read (16384).")] = None,
    tune_passes: Annotated[
        int | None,
        typer.Option(
            min=0, help="Passes over that text to tune the scales in, with the dense base as teacher (1); 0: none."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of what stays dense (head, embeddings, norms); by default what the base has.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Quantise a base once and keep it; nf4 and fp4 load in transformers with bitsandbytes too."""
    from deltaw.errors import BadInput
    from deltaw.merge.quantise import Calibration, quantise_base
    from deltaw.model.quantised import Format

    how = Format(format, block, double_quant)
    settings = {"tokens": calibrate_tokens, "passes": tune_passes}
    given = {k: v for k, v in settings.items() if v is not None}
    if calibrate is None and given:
        raise BadInput("--calibrate-tokens and --tune-passes belong to a text: pass --calibrate FILE too.")
    text = None if calibrate is None else Calibration(calibrate, **given)
    report = quantise_base(base, out, how, dtype=dtype, calibration=text, say=lambda line: typer.echo(line, err=True))
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        typer.echo(
            f"{report.out}: {report.n_quantised} linear maps in {report.format} ({report.bits:.3f} bits a weight, "
            f"{report.quantised_bytes / 1e6:,.1f} MB), {report.dense_bytes / 1e6:,.1f} MB dense; {report.seconds:.1f} s"
        )
