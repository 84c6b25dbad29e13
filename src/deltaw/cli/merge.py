"""deltaw merge: write base + adapter as a plain transformers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.cli.references import RegistryOption, adapter_path
from deltaw.errors import DataError

if TYPE_CHECKING:
    from deltaw.merge.bake import MergeReport


def merge(
    base: Annotated[str, typer.Option(help="A folder, a hub id, a .gguf file or a starter name.")],
    adapter: Annotated[str, typer.Option(help="The folder of an adapter or of a run, or a reference in a registry.")],
    out: Annotated[str, typer.Option(help="Where the merged model goes: a new or empty folder.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; by default what the base has.")
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge although the adapter comes from another base.")
    ] = False,
    text: Annotated[
        str | None, typer.Option(help="A text file to compare the logits on, instead of a page of Austen.")
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Do not load the models to compare logits (saves memory).")
    ] = False,
    into: Annotated[
        str,
        typer.Option(
            help="dense: the base at full precision. For an adapter of a quantised base also dequantised (what that "
            "base computes with, written dense) and quantised (quantised again: loses precision, says how much)."
        ),
    ] = "dense",
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write base + adapter as a plain transformers folder, and say how near the two are."""
    from deltaw.merge.bake import bake

    report = bake(
        base,
        adapter_path(adapter, registry),
        out,
        dtype=dtype,
        allow_other_base=allow_other_base,
        text=None if text is None else _read(text),
        say=lambda line: typer.echo(line, err=True),
        measure=not no_check,
        into=into,
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        Console().print(_table(report))


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"--text {path} cannot be read: {problem}.\n  Give a text file in UTF-8.") from None
    if not text.strip():
        raise DataError(f"--text {path} is empty.\n  Give a text file with a few hundred words.")
    return text


def _table(report: MergeReport) -> Table:
    table = Table(show_header=False, title=Text(f"{report.base} + {report.adapter[:12]}"), title_justify="left")
    table.add_row("written to", Text(report.out))
    table.add_row("weights", f"{report.dtype}, {report.size_bytes / 1e6:,.1f} MB, {report.n_tensors} tensors")
    if report.format != "dense":
        table.add_row("format", f"{report.format}: the change is rounded")
    table.add_row("changed", f"{report.n_tensors_changed} tensors, by at most {report.largest_change:.3g} a weight")
    table.add_row("rounded away", f"{report.lost_share:.2%} of {report.n_weights_changed:,} changes, in {report.dtype}")
    if report.untied:
        table.add_row("untied", "head and embedding are two tensors now")
    if report.new_tokens:
        table.add_row("new tokens", Text(" ".join(report.new_tokens)))
    if report.probe is not None:
        p = report.probe
        table.add_row("logits apart", f"{p.logit_max:.3g} at most, {p.logit_mean:.3g} on average")
        if p.perplexity_before is None:
            table.add_row("same label", f"{p.top1:.1%} of rows cut out of {p.n_tokens} tokens ({p.kind})")
        else:
            table.add_row("same next token", f"{p.top1:.1%} of {p.n_tokens} ({p.kind})")
            table.add_row("perplexity", f"{p.perplexity_before:.4g} before, {p.perplexity_after:.4g} after")
    table.add_row("took", f"{report.seconds:.1f} s")
    return table
