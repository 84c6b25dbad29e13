"""`deltaw bench-serve`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from deltaw.cli.eval import DtypeOption, FormatOption
from deltaw.cli.references import RegistryOption
from deltaw.cli.serve import NEEDED, require_extra
from deltaw.errors import ServeError, WorkFailed


def bench_serve(
    url: Annotated[str | None, typer.Option(help="A running server, as http://127.0.0.1:8000.")] = None,
    base: Annotated[str | None, typer.Option(help="Or a base: a server of our own runs for the test.")] = None,
    registry: RegistryOption = None,
    adapter: Annotated[list[str] | None, typer.Option(help="Of our own server: NAME=PATH; repeatable.")] = None,
    dtype: DtypeOption = "auto",
    format: FormatOption = "dense",
    kv_mb: Annotated[int, typer.Option(min=1, help="Of our own server: memory for keys and values, in MB.")] = 1024,
    max_sequences: Annotated[int, typer.Option(min=1, help="Of our own server: sequences computed at once.")] = 256,
    traffic: Annotated[
        str, typer.Option(help="Over the adapters: uniform, skewed (Zipf), identical (one), none (the base).")
    ] = "uniform",
    model: Annotated[list[str] | None, typer.Option(help="Adapters to ask; by default all listed; repeatable.")] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 48,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests open at once, without --rate.")] = 16,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Requests begun each second, at random times.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 64,
    output_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer; with --prompts the most.")] = 64,
    prompts: Annotated[Path | None, typer.Option(help="JSONL of your own: rows with prompt or messages.")] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="Requests before, which do not count.")] = 2,
    seed: Annotated[int, typer.Option(help="Of prompts, adapters and times.")] = 0,
    key: Annotated[str | None, typer.Option(envvar="DELTAW_API_KEY", help="API key of the server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Load a server with your adapters and traffic; throughput, and latencies at 50, 90 and 99 percent."""
    require_extra(("httpx",) if url else (*NEEDED, "httpx"))
    from deltaw.serve.load_test import Load, read_prompts, run_load
    from deltaw.serve.process import own_server

    if (url is None) == (base is None):
        raise ServeError("Give --url of a running server, or --base for one of our own.")
    load = Load(
        traffic, tuple(model or ()), requests, rate, concurrency, prompt_tokens, output_tokens,
        read_prompts(prompts) if prompts else (), warm_up, seed, key,
    )  # fmt: skip
    if url is not None:
        found = asyncio.run(run_load(url.rstrip("/").removesuffix("/v1"), load))
    else:
        own = ["--base", str(base), "--dtype", dtype, "--format", format]
        own += ["--kv-mb", str(kv_mb), "--max-sequences", str(max_sequences)]
        own += [word for given in adapter or () for word in ("--adapter", given)]
        own += [] if registry is None else ["--registry", str(registry)]
        with own_server(own) as server:
            found = asyncio.run(run_load(server.url, load))
    typer.echo(json.dumps(found) if as_json else _table(found))
    if sum(found["errors"].values()) == found["requests"]:
        raise WorkFailed("Every request failed.")


def _table(found: dict[str, Any]) -> str:
    lines = [
        f"{found['requests']} requests over {found['models']} models in {found['seconds']} s",
        f"{found['output_tokens_per_s']} output tokens/s, {found['requests_per_s']} requests/s",
        f"{'ms':16}{'p50':>10}{'p90':>10}{'p99':>10}",
    ]
    for name, what in (("ttft_ms", "first token"), ("inter_token_ms", "between tokens"), ("latency_ms", "whole")):
        lines.append(f"{what:16}" + "".join(f"{'-' if v is None else v:>10}" for v in found[name].values()))
    errors = ", ".join(f"{n} x {what}" for what, n in found["errors"].items())
    return "\n".join([*lines, f"errors: {errors or 'none'}"])
