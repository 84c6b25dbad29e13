"""`deltaw adapters`: a registry of adapters with versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.cli.inspect import shown
from deltaw.cli.references import RegistryOption, open_registry
from deltaw.errors import RegistryError

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")]
RefArgument = Annotated[str, typer.Argument(help="NAME (= NAME@current), NAME@3, NAME@LABEL, or 8 or more of an id.")]
NameArgument = Annotated[str, typer.Argument(help="The adapter's name.")]
LabelOption = Annotated[str, typer.Option(help="The label that moves.")]

app = typer.Typer(help="Keep adapters in a registry: versions, labels, promotion and rollback.", no_args_is_help=True)


@app.command()
def add(
    name: NameArgument,
    path: Annotated[Path, typer.Argument(help="Folder of an adapter, or of a run.")],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep an adapter as the next version of NAME: the first becomes `current`, later ones `candidate`."""
    from deltaw.store.references import check_name

    check_name(name)  # no registry is made for it
    found = open_registry(registry, create=True).add(name, path)
    _say(found, as_json, _added(found))


@app.command("list")
def list_(
    base: Annotated[
        str | None, typer.Option(help="A base: say of each current adapter whether it fits or must be re-adapted.")
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List every name with its versions, labels and current adapter."""
    print_ = None
    if base is not None:
        from deltaw.core.fingerprint import fingerprint_folder
        from deltaw.model.load import resolve_base

        print_ = fingerprint_folder(resolve_base(base, say=lambda line: typer.echo(line, err=True)))
    rows = open_registry(registry).listing(print_)
    if as_json:
        typer.echo(json.dumps({"adapters": rows}))
        return
    fits = {"yes": "fits", "no": "re-adapt", "unknown": "unknown", None: ""}
    table = []
    for row in rows:
        labels = "\n".join(f"{label}@{version}" for label, version in sorted(row["labels"].items()))
        cells = {"name": row["name"], "labels": labels, "current": (row["id"] or "none")[:12], "base": row["base"]}
        if base is None:
            cells |= {"versions": row["versions"], "method": row["method"]}
        else:
            cells["on the new base"] = " ".join([fits[row["fits"]], *row["differs"]])
        table.append(cells)
    _table(table or [{"name": "no adapters yet"}])


@app.command()
def show(
    ref: RefArgument,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a name with its versions and history, or one version with where it comes from and its gates."""
    found = open_registry(registry).show(ref)
    if as_json:
        typer.echo(json.dumps(found))
        return
    lists = {k: found.pop(k) for k in ("versions", "history") if k in found}
    met = found.pop("gates", [])
    if "recipe" in found:
        _fields(found)
    for title, rows in lists.items():
        _table(rows, title)
    for g in met:
        other = "" if g["against"] is None else f" against {g['against_value']:g} of version {g['against']}"
        verdict = "passed" if g["passed"] else "not passed"
        typer.echo(f"gate for {g['label']}, {g['at']}: {verdict}, {g['value']:g}{other}\n  {g['command']}")


@app.command()
def diff(
    a: RefArgument,
    b: RefArgument,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what differs between two adapters: settings, base, recipe, data, metrics, tensors."""
    found = open_registry(registry).diff(a, b)
    if as_json:
        typer.echo(json.dumps(found))
    else:
        _fields(found)


@app.command()
def promote(
    ref: RefArgument,
    label: LabelOption = "current",
    gate: Annotated[
        str | None,
        typer.Option(help='Measure first: a command with {adapter} that prints JSON with "value" (no shell runs it).'),
    ] = None,
    gate_min_gain: Annotated[
        float | None, typer.Option(help="Least value of the version less that of the one the label is on.")
    ] = None,
    gate_min_value: Annotated[float | None, typer.Option(help="Least value of the version.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a label on a version, if it passes the gate."""
    from deltaw.store.gate import Gate

    if gate is None and (gate_min_gain is not None or gate_min_value is not None):
        raise RegistryError("--gate-min-gain and --gate-min-value say what a --gate must give: add --gate.")
    asked = None if gate is None else Gate(gate, gate_min_gain, gate_min_value)
    found = open_registry(registry).promote(ref, label, asked)
    was = f"was {found['before']}" if found["changed"] and found["before"] else "new" if found["changed"] else "already"
    met = found["gate"]
    told = "" if met is None else f"; gate passed: {met['value']:g}"
    told += "" if met is None or met["against_value"] is None else f" against {met['against_value']:g}"
    _say(found, as_json, f"{found['name']}@{found['label']} is version {found['version']} ({was}){told}")


@app.command()
def rollback(
    name: NameArgument,
    label: LabelOption = "current",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Put a label back on the version it was on before; again, and it goes further back."""
    found = open_registry(registry).rollback(name, label)
    over = f"; removed since and passed over: {', '.join(map(str, found['skipped']))}" if found["skipped"] else ""
    _say(found, as_json, f"{name}@{label} is version {found['version']} (was {found['before'] or 'none'}){over}")


@app.command()
def remove(
    ref: RefArgument,
    label: Annotated[str | None, typer.Option(help="Take this label off NAME instead; no version goes.")] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forget a version that nothing refers to (or take a label off); `gc` then frees its files."""
    opened = open_registry(registry)
    if label is not None:
        found = opened.unlabel(ref, label)
        _say(found, as_json, f"took {label} off {ref}@{found['before']}")
    else:
        found = opened.remove(ref)
        _say(found, as_json, f"removed {found['name']}@{found['version']} ({found['id'][:12]})")


@app.command()
def gc(registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Delete the files that no version refers to and no process uses."""
    found = open_registry(registry).gc()
    kept = f", kept {len(found['in_use'])} in use" if found["in_use"] else ""
    left = f", cleared {found['left_aside']} unfinished" if found["left_aside"] else ""
    _say(found, as_json, f"deleted {len(found['deleted'])} adapters, {found['bytes'] / 1e6:.2f} MB{kept}{left}")


@app.command()
def verify(registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """Check every byte of every version, and the index; exit code 1 when something is wrong."""
    found = open_registry(registry).verify()
    bad = [f"{', '.join(d['versions'])} ({d['id'][:12]}): {d['why']}" for d in found["damaged"]] + found["problems"]
    loose = f"; gc would delete {found['unreferenced']}" if found["unreferenced"] else ""
    sound = f"sound: {found['checked']} adapters checked{loose}"
    _say(found, as_json, sound if found["sound"] else "\n".join(["not sound:", *bad]))
    if not found["sound"]:
        raise typer.Exit(1)


@app.command()
def push(
    ref: RefArgument,
    url: Annotated[str, typer.Argument(help="A folder, memory://, s3://bucket/path or hf://owner/repo.")],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy an adapter elsewhere: PEFT's layout, a model card, and a manifest last."""
    found = open_registry(registry).push(ref, url)
    _say(found, as_json, f"pushed {ref} ({found['id'][:12]}) to {url}: {found['bytes'] / 1e6:.2f} MB")


@app.command()
def pull(
    name: NameArgument,
    url: Annotated[str, typer.Argument(help="Where `push` wrote an adapter.")],
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add an adapter that was pushed as the next version of NAME, after checking every hash."""
    found = open_registry(registry, create=True).pull(name, url)
    _say(found, as_json, _added(found))


def _added(found: dict[str, Any]) -> str:
    labels = f" ({', '.join(found['labels'])})" if found["labels"] else ""
    verb = "is" if found["new"] else "was already"
    return f"{found['name']}@{found['version']}{labels} {verb} {found['id'][:12]}"


def _say(found: dict[str, Any], as_json: bool, text: str) -> None:
    typer.echo(json.dumps(found) if as_json else text)


def _fields(found: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for key, value in found.items():
        table.add_row(key.replace("_", " "), Text(shown(value)))
    Console().print(table)


def _table(rows: list[dict[str, Any]], title: str | None = None) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        justify: Literal["left", "right"] = "right" if isinstance(rows[0][key], int) else "left"
        table.add_column(key.replace("_", " "), justify=justify, overflow="fold")
    for row in rows:
        cells = (v[:12] if k == "id" and v else " ".join(v) if isinstance(v, list) else v for k, v in row.items())
        table.add_row(*(Text(_cell(cell)) for cell in cells))
    Console().print(table)


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_cell(v)}" for k, v in value.items() if v is not None)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
