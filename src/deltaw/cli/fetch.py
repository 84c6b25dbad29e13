"""deltaw fetch: get a base once, print its folder."""

from __future__ import annotations

import json as json_format

import typer


def fetch(
    name: str = typer.Argument(..., help="a starter name, a hub id, a .gguf file or a folder"),
    json: bool = typer.Option(False, "--json", help="print one JSON object instead of the folder"),
) -> None:
    """Fetch a base into the cache and print its folder."""
    from deltaw.core.fingerprint import fingerprint_folder
    from deltaw.model.load import resolve_base

    folder = resolve_base(name, say=lambda line: typer.echo(line, err=True)).resolve()
    if json:
        fingerprint = fingerprint_folder(folder)
        found = {"name": fingerprint.name, "path": str(folder), "fingerprint": fingerprint.model_dump()}
        typer.echo(json_format.dumps(found))
    else:
        typer.echo(str(folder))
