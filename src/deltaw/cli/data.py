"""deltaw data: look at rows as the training sees them."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.errors import DataError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Look at rows as the training sees them."""


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Like data.max_tokens=256.")
    ] = None,
    limit: Annotated[int, typer.Option(min=0, help="How many rows to print.")] = 3,
    split: Annotated[Literal["train", "valid"], typer.Option(help="Which rows.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print rows with their targets in double brackets, and how long the rows are."""
    from deltaw.data import encode_all, length_statistics, marked, read_rows
    from deltaw.data.task import given_labels
    from deltaw.model.base import task_before
    from deltaw.model.load import load_tokenizer
    from deltaw.train.recipe import load_recipe

    settings = load_recipe(recipe, overrides or [])
    source = getattr(settings.data, split)
    if source is None:
        raise DataError(f"the recipe {recipe!r} names no data.{split}.\n  Add it: data.{split}=rows.jsonl")
    rows = read_rows(source)
    tokenizer = load_tokenizer(settings.base.path)
    task = task_before(settings.base.path, given_labels(settings.data))
    encoded = encode_all(rows, tokenizer, settings.data, task)
    shown = [(example, marked(example, tokenizer, task)) for example in encoded.examples[:limit]]
    statistics = length_statistics(encoded)
    if as_json:
        described = [
            {
                "where": example.where,
                "tokens": len(example.input_ids),
                "targets": example.n_targets,
                "cut": example.was_cut,
                "pieces": [{"text": text, "target": is_target} for text, is_target in pieces],
            }
            for example, pieces in shown
        ]
        typer.echo(json.dumps({"split": split, "source": source, "rows": described, "statistics": statistics}))
        return
    console = Console()
    for example, pieces in shown:
        cut = ", cut" if example.was_cut else ""
        title = f"{example.where} ({len(example.input_ids)} tokens, {example.n_targets} targets{cut})"
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(_painted(pieces), soft_wrap=True)
        console.print()
    console.print(_table(source, statistics))


def _painted(pieces: list[tuple[str, bool]]) -> Text:
    """The pieces as one text, targets green and in [[ ]], which survives where there is no colour."""
    painted = Text()
    for text, is_target in pieces:
        painted.append(f"[[{text}]]" if is_target else text, style="green" if is_target else "dim")
    return painted


def _table(source: str, statistics: dict[str, int | float]) -> Table:
    table = Table(title=Text(f"{source}: tokens a row"), title_justify="left")
    for name in statistics:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in statistics.values()))
    return table
