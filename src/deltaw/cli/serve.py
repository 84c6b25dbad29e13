"""`deltaw serve`."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.eval import BaseOption, BlockOption, DeviceOption, DoubleOption, DtypeOption, FormatOption
from deltaw.cli.references import RegistryOption, open_registry, registry_default
from deltaw.errors import ServeError

if TYPE_CHECKING:
    from deltaw.model.model import Model
    from deltaw.serve.settings import ServerSettings
    from deltaw.store.registry import Registry

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")

_say = partial(typer.echo, err=True)


def require_extra(modules: tuple[str, ...]) -> None:
    """Raise ServeError, with what to install, where a package of the extra `serve` is missing."""
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise ServeError(f"This needs {', '.join(missing)}: pip install 'deltaw[serve]'.")


def parse_given(given: list[str]) -> list[tuple[str, str]]:
    """NAME=PATH, each. Raises ServeError for anything else."""
    pairs = [(name, path) for name, _, path in (text.partition("=") for text in given)]
    for text, (name, path) in zip(given, pairs, strict=True):
        if not name or not path:
            raise ServeError(f"--adapter takes NAME=PATH, not {text!r}.")
    return pairs


def name_of(base: str, name: str | None, told: str | None) -> str:
    """What requests call the base: `name`, else a starter or hub id as it was given, else the name it tells."""
    if name is not None:
        return name
    return told or Path(base).name if Path(base).expanduser().exists() or base.endswith(".gguf") else base


def serve(
    base: BaseOption,
    registry: RegistryOption = None,
    adapter: Annotated[list[str] | None, typer.Option(help="NAME=PATH of an adapter or a run; repeatable.")] = None,
    adapter_root: Annotated[
        list[Path] | None, typer.Option(help="Folder from which an admin may load adapters by request; repeatable.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call the base; by default its own name.")] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than loopback lets others in.")
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Another name (Host) by which it may be called on loopback; repeatable.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 8000,
    dtype: DtypeOption = "auto",
    format: FormatOption = "dense",
    block: BlockOption = 64,
    double_quant: DoubleOption = False,
    device: DeviceOption = "cpu",
    kv_mb: Annotated[int, typer.Option(min=1, help="Memory for keys and values, in MB.")] = 1024,
    adapters_mb: Annotated[int, typer.Option(min=1, help="Memory for adapters in the engine, in MB.")] = 1024,
    host_mb: Annotated[int, typer.Option(min=0, help="Memory for adapters that were read, in MB.")] = 1024,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences that are computed at once.")] = 256,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; then 429 with Retry-After.")] = 256,
    max_body_kb: Annotated[int, typer.Option(min=1, help="Largest body of a request, in KB.")] = 2048,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt.")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.")] = None,
    drain_s: Annotated[float, typer.Option(min=0, help="After SIGTERM, seconds for running requests to end.")] = 30.0,
    api_keys: Annotated[
        Path | None, typer.Option(help="Key file (deltaw keys); without one no key is asked for.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="DELTAW_ADMIN_KEY", help="Opens loading and unloading by request; better by DELTAW_ADMIN_KEY."
        ),
    ] = None,
    json_logs: Annotated[bool, typer.Option("--json-logs", help="One JSON object a line on standard error.")] = False,
) -> None:
    """Serve a base with any number of adapters over HTTP, as OpenAI's API."""
    require_extra(NEEDED)
    from deltaw.serve.hosts import check_address, hosts_of
    from deltaw.serve.keys import hash_admin_key
    from deltaw.serve.settings import ServerSettings

    check_address(host, port)
    settings = ServerSettings(
        max_body_bytes=max_body_kb * 1024, max_prompt_tokens=max_prompt_tokens, max_output_tokens=max_output_tokens,
        max_sequences=max_sequences, max_queue=max_queue, drain_s=drain_s, keys_file=api_keys,
        admin_sha256=None if admin_key is None else hash_admin_key(admin_key), adapter_roots=tuple(adapter_root or ()),
        hosts=hosts_of(host, allow_host or (), has_keys=api_keys is not None),
    )  # fmt: skip
    given = parse_given(adapter or [])
    kept = open_registry(registry) if registry is not None or registry_default() else None
    from deltaw.model.base import load_base

    model = load_base(base, format, dtype, _say, block=block, double_quant=double_quant, device=device)
    own = name_of(base, name, None if model.fingerprint is None else model.fingerprint.name)
    _run(model, own, kept, given, settings, (kv_mb, host_mb, adapters_mb), (host, port), json_logs=json_logs)


def _run(
    model: Model,
    name: str,
    registry: Registry | None,
    given: list[tuple[str, str]],
    settings: ServerSettings,
    sizes: tuple[int, int, int],
    address: tuple[str, int],
    *,
    json_logs: bool,
) -> None:
    """Serve until a signal. sizes: MB for keys and values, adapters that were read, adapters in the engine."""
    from deltaw.serve.app import make_app
    from deltaw.serve.engine import Engine
    from deltaw.serve.logs import set_up_logs
    from deltaw.serve.served import Served
    from deltaw.serve.server import make_server, run_server

    kv, read, active = (mb * 2**20 for mb in sizes)
    engine = Engine(model, kv_bytes=kv, max_sequences=settings.max_sequences)
    served = Served(model, engine, name, registry, settings.adapter_roots, read, active)
    for short, path in given:
        served.give(short, path)
    set_up_logs(json_logs)
    run_server(make_server(make_app(served, settings), *address), _say)
