"""The program `deltaw`: commands are registered here, and errors become one message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from pathlib import Path

import typer

import deltaw
from deltaw.cli import adapters, data, export, keys
from deltaw.cli.bench_serve import bench_serve
from deltaw.cli.combine import combine
from deltaw.cli.compress import compress
from deltaw.cli.diagnose import diagnose
from deltaw.cli.eval import evaluate
from deltaw.cli.extract import extract
from deltaw.cli.fetch import fetch
from deltaw.cli.generate import generate
from deltaw.cli.inspect import inspect
from deltaw.cli.lab import lab
from deltaw.cli.merge import merge
from deltaw.cli.plan import plan
from deltaw.cli.quantize import quantize
from deltaw.cli.readapt import readapt
from deltaw.cli.references import set_registry
from deltaw.cli.serve import serve
from deltaw.cli.train import train
from deltaw.core.fingerprint import set_cache_dir
from deltaw.errors import DeltawError

app = typer.Typer(
    name="deltaw",
    help="Train, keep, merge and serve small changes (dW) to large frozen language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("fetch")(fetch)
app.command("plan")(plan)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("merge")(merge)
app.command("combine")(combine)
app.command("extract")(extract)
app.command("compress")(compress)
app.command("quantize")(quantize)
app.command("inspect")(inspect)
app.command("diagnose")(diagnose)
app.command("readapt")(readapt)
app.command("serve")(serve)
app.command("bench-serve")(bench_serve)
app.command("lab")(lab)
app.add_typer(adapters.app, name="adapters")
app.add_typer(export.app, name="export")
app.add_typer(data.app, name="data")
app.add_typer(keys.app, name="keys")


def _version(asked: bool) -> None:
    if asked:
        print(f"deltaw {deltaw.__version__}")
        raise typer.Exit


@app.callback()
def _settings(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    """Environment variables are read here and nowhere else, but for those of OpenMP (`deltaw.cli`)."""
    if folder := os.environ.get("DELTAW_CACHE"):
        set_cache_dir(Path(folder))
    set_registry(os.environ.get("DELTAW_REGISTRY"), os.environ.get("DELTAW_INDEX"))


def _say_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    if category.__module__.startswith("deltaw"):
        print(f"warning: {message}", file=sys.stderr)


_OF_A_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def main() -> None:
    """Run the program. Exit codes: 0 done, 1 the work failed, 2 bad input."""
    warnings.showwarning = _say_warning  # type: ignore[assignment]
    try:
        app()
    except DeltawError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        where = f"{str(error.filename)!r:.200}: " if error.filename is not None else ""
        print(f"{type(error).__name__}: {where}{error.strerror or error}.", file=sys.stderr)
        sys.exit(2 if error.errno in _OF_A_NAME else 1)
    except KeyboardInterrupt:
        sys.exit(130)
