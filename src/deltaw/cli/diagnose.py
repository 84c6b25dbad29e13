"""deltaw diagnose: what went wrong with a run or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.references import RegistryOption, adapter_path

if TYPE_CHECKING:
    from deltaw.diagnose.diagnose import Diagnosis


def diagnose(
    path: Annotated[str, typer.Argument(help="Folder of a run or of an adapter, or NAME[@V] in the registry.")],
    base: Annotated[str | None, typer.Option(help="Its base; by default the one it names, where that is here.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Rows to measure the loss on, with and without it (64); of --try-rank: its rows.")
    ] = None,
    merged: Annotated[
        str | None, typer.Option(help="A model this adapter was merged into: what is left of the update there.")
    ] = None,
    merge_dtype: Annotated[
        str, typer.Option(help="What a merge would be written in: float32, bfloat16, float16, nf4, fp4, int4 or int8.")
    ] = "bfloat16",
    forgetting: Annotated[
        bool, typer.Option("--forgetting", help="Ask general questions before and after (takes minutes).")
    ] = False,
    general: Annotated[
        str | None, typer.Option(help="Rows with choices for that; data/general_mcq/questions.jsonl where it is here.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Rows of general text for that; data/ppl/wiki.jsonl where it is here.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows of --general and --text.")] = None,
    try_rank: Annotated[
        int | None, typer.Option(min=1, help="Train the run's steps again with this rank and compare (as long as it).")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Write report.html and its pictures into this new folder.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when something is found.")] = False,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what went wrong with a run or an adapter, why, and what to do."""
    from deltaw.diagnose.diagnose import diagnose as look
    from deltaw.diagnose.report import json_safe, write_report
    from deltaw.merge.write import refuse_used

    if out is not None:
        refuse_used(Path(out))
    found = look(
        adapter_path(path, registry),
        base,
        data=data,
        merged=merged,
        merge_dtype=merge_dtype,
        check_forgetting=forgetting,
        general=general,
        text=text,
        limit=limit,
        rank=try_rank,
        say=lambda line: typer.echo(line, err=True),
    )
    if out is not None:
        typer.echo(f"the report is {write_report(found, out) / 'report.html'}", err=True)
    if as_json:
        typer.echo(json.dumps(json_safe(found.as_dict())))
    else:
        _print(found)
    if strict and found.findings:
        raise typer.Exit(1)


def _print(found: Diagnosis) -> None:
    for f in found.findings:
        typer.echo(f"{f.title} [{f.kind}]\n  {f.message[:1].upper()}{f.message[1:]}\n  What to do: {f.remedy}\n")
    if not found.findings:
        typer.echo("None of the known failures was found.")
    for skipped in found.not_made:
        typer.echo(f"not checked: {skipped['check']}: {skipped['why']}")
