"""`deltaw plan`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.errors import BadInput, RecipeError


def plan(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE] [key=value]...", help="A recipe, and settings on top of it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A base's folder, a hub id, or a shape: 7B, 13B, 65B, 70B, mistral-7b, phi-2 ...")
    ] = None,
    method: Annotated[str, typer.Option(help="A method, or qlora: lora over nf4 with double quantisation.")] = "lora",
    rank: Annotated[int | None, typer.Option(help="Rank of the adapter.")] = None,
    targets: Annotated[str | None, typer.Option(help="all-linear, or names with commas: q_proj,v_proj.")] = None,
    format: Annotated[str | None, typer.Option(help="dense, nf4, fp4, int4 or int8.")] = None,
    block: Annotated[int | None, typer.Option(help="Values that share a scale.")] = None,
    double_quant: Annotated[bool, typer.Option("--double-quant", help="Scales in 8 bits too.")] = False,
    dtype: Annotated[str | None, typer.Option(help="In which the base computes.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 4,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 512,
    learned: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of a row's tokens that are targets.")] = 1.0,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Rows computed at a time; all by default.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adamw8 (8 bits), paged, galore or galore8.")] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Compute blocks again in the backward.")
    ] = False,
    memory_gb: Annotated[float | None, typer.Option(help="Choose settings that fit so many GB (10^9 bytes).")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run real steps too, and compare.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Steps that --measure runs.")] = 3,
    rules: Annotated[bool, typer.Option("--rules", help="Show rules of thumb and what they assume.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a run would take in memory, by cause, before it is started; or what fits."""
    from deltaw.train import run  # noqa: F401  (what a run imports is part of what it takes)
    from deltaw.train.fitting import fit, work_of_rows
    from deltaw.train.measure import compared, measured
    from deltaw.train.planning import Planner, Work
    from deltaw.train.recipe import load_recipe

    overrides = [w for w in what or [] if "=" in w]
    files = [w for w in what or [] if "=" not in w]
    if len(files) > 1 or bool(files) == (base is not None):
        raise BadInput("plan takes a RECIPE or --base, one of the two.")
    if files:
        recipe = load_recipe(files[0], overrides)
        work = work_of_rows(recipe) or Work.of_rows(max(1, recipe.train.tokens_per_step // length), length, learned)
        memory_gb = memory_gb if memory_gb is not None or recipe.budget is None else recipe.budget.memory_gb
    else:
        flags = {"format": format, "block": block, "double_quant": double_quant or None, "dtype": dtype}
        train = {"checkpointing": checkpointing or None, "tokens_per_step": batch * length} | _optimizer(optimizer)
        train["micro_tokens"] = micro_batch and micro_batch * length
        settings = _base(str(base), method, flags, {"rank": rank, "targets": _names(targets)}) | {
            "train": _given(train)
        }
        recipe = load_recipe(settings, overrides)
        work = Work.of_rows(batch, length, learned)
    planner = Planner(recipe, work)
    recipe, found = (recipe, planner.plan()) if memory_gb is None else fit(planner, memory_gb)
    plain = found.plain()
    if measure:
        took = measured(planner, recipe, steps)
        plain |= {"measured": took, "errors": compared(found, took)}
    typer.echo(json.dumps(plain)) if as_json else _print(plain, rules)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if v is not None}


def _names(targets: str | None) -> str | list[str] | None:
    if targets is None or targets == "all-linear" or any(c in targets for c in "*()[]|\\"):
        return targets
    return [t.strip() for t in targets.split(",")]


def _base(name: str, method: str, flags: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    if method == "qlora":
        method = "lora"
        flags = {**flags, "format": flags["format"] or "nf4"}
        flags["double_quant"] = None if flags["format"] == "dense" else True
    return {"base": {"path": name, **_given(flags)}, "adapter": {"method": method, **_given(adapter)}}


def _optimizer(name: str | None) -> dict[str, Any]:
    known: dict[str, dict[str, Any]] = {
        "adamw": {},
        "adamw8": {"bits": 8},
        "paged": {"paged": True},
        "galore": {"name": "galore"},
        "galore8": {"name": "galore", "bits": 8},
    }
    if name is not None and name not in known:
        raise RecipeError(f"--optimizer is {name!r}; write one of {', '.join(known)}.")
    return {"optimizer": known[name]} if name else {}


def _print(plain: dict[str, Any], rules: bool) -> None:
    console = Console()
    s = plain["settings"]
    adapter = s["adapter"]
    rank = f" rank {adapter['rank']}" if "rank" in adapter else ""
    kept = s["format"] + (" with double quantisation" if s["double_quant"] else "")
    again = ", blocks computed again" if s["checkpointing"] else ""
    console.print(
        Text(
            f"{plain['base']}: {plain['parameters']:,} parameters in {kept}, {s['dtype']}; {adapter['method']}{rank} "
            f"trains {plain['trainable']:,} ({plain['trainable_percent']:.4g} %)\n"
            f"a step of {s['rows']} rows, {s['tokens']:,} tokens ({s['target_tokens']:,} targets), "
            f"{s['micro_rows']} rows at a time{again}"
        )
    )
    table = Table(title=Text(f"at the peak ({plain['peak_moment']})"), title_justify="left")
    table.add_column("cause")
    table.add_column("bytes", justify="right")
    table.add_column("GB", justify="right")
    for cause, size in [*plain["bytes"].items(), ("peak", plain["peak_bytes"])]:
        table.add_row(cause, f"{size:,}", f"{size / 1e9:.3f}")
    console.print(table)
    console.print(
        Text(
            f"after loading {plain['after_load_bytes'] / 1e9:.3f} GB, growth {plain['growth_bytes'] / 1e9:.3f} GB; "
            f"a budget must hold {plain['needed_bytes'] / 1e9:.3f} GB"
        )
    )
    for line in plain["gave_up"]:
        console.print(Text(f"to fit: {line}"))
    if "errors" in plain:
        console.print(_errors(plain["errors"]))
    if rules:
        console.print(_rules(plain["rules"]))


def _errors(errors: dict[str, dict[str, float]]) -> Table:
    table = Table(title=Text("planned and measured, GB"), title_justify="left")
    for column in ("", "planned", "measured", "error"):
        table.add_column(column, justify="right" if column else "left")
    for name, e in errors.items():
        table.add_row(name, f"{e['planned'] / 1e9:.3f}", f"{e['measured'] / 1e9:.3f}", f"{e['error']:+.1%}")
    return table


def _rules(rows: list[dict[str, Any]]) -> Table:
    table = Table(title=Text("rules of thumb, for these counts"), title_justify="left")
    for column in ("rule", "GB", "assumes"):
        table.add_column(column)
    for row in rows:
        table.add_row(Text(row["rule"]), f"{row['bytes'] / 1e9:.2f}", Text(row["assumes"]))
    return table
