"""`deltaw keys`: who may use a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Keys for deltaw serve: made once, kept as hashes.", no_args_is_help=True)

FileOption = Annotated[Path, typer.Option("--file", help="The key file that deltaw serve --api-keys reads.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
NameArgument = Annotated[str, typer.Argument(help="Whose key it is.")]


@app.command()
def add(
    name: NameArgument,
    file: FileOption,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A model that it may use, in all versions; repeatable. Else all."),
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(min=1, help="Requests that it may have open at once.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key, print it once, and keep its hash in the file."""
    from deltaw.serve.keys import add_key

    key, secret = add_key(file, name, tuple(model or ("*",)), max_concurrent)
    if as_json:
        typer.echo(json.dumps({"name": key.name, "key": secret, "models": key.models}))
    else:
        typer.echo(secret)
        typer.echo("This is the only time that it is shown.", err=True)


@app.command()
def remove(name: NameArgument, file: FileOption, as_json: JsonOption = False) -> None:
    """Forget a key; a running server refuses it from the next request on."""
    from deltaw.serve.keys import remove_key

    remove_key(file, name)
    typer.echo(json.dumps({"name": name, "removed": True}) if as_json else f"removed {name}")


@app.command("list")
def list_(file: FileOption, as_json: JsonOption = False) -> None:
    """List the keys by name, with what they may use."""
    from deltaw.serve.keys import read_keys

    keys = read_keys(file)
    if as_json:
        told = [{"name": k.name, "models": k.models, "max_concurrent": k.max_concurrent} for k in keys]
        typer.echo(json.dumps({"keys": told}))
        return
    for key in keys:
        most = f", at most {key.max_concurrent} at once" if key.max_concurrent else ""
        typer.echo(f"{key.name}: {', '.join(key.models)}{most}")
