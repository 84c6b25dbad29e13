"""`deltaw train`."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings on top of it, as train.lr=1e-3.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder (runs/<recipe> by default).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON event a line, nothing else.")] = False,
    allow_other_machine: Annotated[
        bool,
        typer.Option(
            "--allow-other-machine", help="Go on although machine, threads or versions differ from when the run began."
        ),
    ] = False,
) -> None:
    """Train an adapter. The same command goes on with a run that was stopped, bit for bit.

    Ctrl-C ends it at once; SIGTERM after the present step, with a checkpoint.
    """
    from deltaw.train.run import train as run

    console = Console(stderr=True, markup=False)
    try:
        with _asked_to_stop() as asked:
            events = run(
                recipe,
                out,
                overrides=overrides or [],
                allow_other_machine=allow_other_machine,
                say=lambda text: console.print(text, highlight=False),
                stop=asked,
            )
            seen: list[str] = []
            events = _noting(events, seen)
            if as_json:
                for event in events:
                    typer.echo(json.dumps(event.plain()))
            else:
                show_events(events, Console(markup=False))
            if seen[-1:] != ["done"]:
                typer.echo("Stopped, with a checkpoint. The same command goes on from there.", err=True)
                raise typer.Exit(143)
    except KeyboardInterrupt:
        typer.echo("Stopped. The same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None


def _noting(events: Iterator[Any], seen: list[str]) -> Iterator[Any]:
    for event in events:
        seen[:] = [event.kind]
        yield event


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM asks for an end. Before the first step, or asked twice, it is like Ctrl-C."""
    heard = {"asks": 0, "steps": 0}

    def hear(*_: Any) -> None:
        heard["asks"] += 1
        if heard["asks"] > 1 or not heard["steps"]:
            raise KeyboardInterrupt

    def asked() -> bool:
        heard["steps"] += 1
        return heard["asks"] > 0

    before = signal.signal(signal.SIGTERM, hear)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def show_events(events: Any, console: Console) -> None:
    """Progress for a person: loss, tokens/s, time left, peak memory; evaluations as lines."""
    bar = Progress(
        TextColumn("step {task.completed}/{task.total}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
        console=console,
    )
    first = next(events)  # what cannot begin is an error, without a bar
    with bar:
        task = bar.add_task("train", total=None, state="loading")
        last_line, grown = 0.0, ""
        for event in chain([first], events):
            e = event.plain()
            kind = e["event"]
            if kind == "planned":
                gave_up = "; ".join(e["gave_up"]) or "nothing had to change"
                bar.print(f"{e['needed_bytes'] / 1e9:.2f} GB planned of {e['memory_gb']:g}: {gave_up}")
            elif kind == "start":
                bar.update(task, total=e["n_steps"], completed=e["first_step"], state="")
                went_on = f", going on after step {e['first_step']}" if e["first_step"] else ""
                bar.print(
                    f"{e['rows']} rows ({e['rows_cut']} cut, {e['rows_skipped']} skipped), "
                    f"{e['tokens_per_epoch']:,} tokens an epoch, {e['parameters']:,} trainable parameters on "
                    f"{e['base']} in {e['dtype']}, blocks {e['blocks']}{went_on}"
                )
            elif kind == "step":
                memory = "" if e["peak_rss_mb"] is None else f", peak {e['peak_rss_mb'] / 1000:.1f} GB"
                grown = grown if e["growth"] is None else f", dW {100 * e['growth']:.2g} % of W"
                state = f"loss {e['loss']:.4f}, {e['tokens_per_s']:.0f} tokens/s{memory}{grown}"
                bar.update(task, completed=e["step"], state=state)
                if not console.is_terminal and time.monotonic() - last_line > 15:
                    console.print(f"step {e['step']}: {state}", highlight=False)
                    last_line = time.monotonic()
            elif kind == "eval":
                best = " (best)" if e["is_best"] else ""
                bar.print(f"step {e['step']}: valid {e['metric']} {e['value']:.4f}{best}")
            elif kind == "done":
                result = e["adapter"] or e["model"]
                early = ", stopped early" if e["stopped_early"] else ""
                bar.print(
                    f"done: {e['steps']} steps{early}, {e['seconds']:.0f} s, {e['tokens_per_s']:.0f} tokens/s. "
                    f"Saved in {result}"
                )
