"""`deltaw readapt`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from deltaw.cli.references import RegistryOption, adapter_path
from deltaw.cli.train import show_events


def readapt(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder, or a reference in a registry.")],
    base: Annotated[str, typer.Option(help="The new base: a folder, hub id, .gguf file or starter name.")],
    out: Annotated[Path, typer.Option(help="The new run's folder.")],
    data: Annotated[Path | None, typer.Option(help="Training rows instead of those that it learned.")] = None,
    valid: Annotated[Path | None, typer.Option(help="Validation rows instead of its own.")] = None,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event a line, nothing else.")] = False,
) -> None:
    """Train an adapter again on a new base, from the recipe that it carries."""
    from deltaw.train.readapt import readapt as run

    events = run(adapter_path(adapter, registry), base, out, data=data, valid=valid, say=partial(typer.echo, err=True))
    if as_json:
        for event in events:
            typer.echo(json.dumps(event.plain()))
    else:
        show_events(events, Console(markup=False))
