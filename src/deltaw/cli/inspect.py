"""deltaw inspect: what an adapter, a run, a base or this machine is."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deltaw.cli.references import RegistryOption, adapter_path
from deltaw.errors import BadInput, NotFound, RegistryError

ISA_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "peft", "numpy")
SHORT = 12  # letters of a hash that a table shows


def inspect(
    path: Annotated[
        str | None,
        typer.Argument(help="An adapter, a run, a base's folder, a starter name, a .gguf file or a reference."),
    ] = None,
    machine: Annotated[bool, typer.Option("--machine", help="Describe this machine instead.")] = False,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what an adapter, a run, a base or this machine is."""
    if machine == (path is not None):
        raise BadInput("inspect takes a PATH or --machine, one of the two.")
    found = describe_machine() if path is None else describe(path, registry)
    if as_json:
        typer.echo(json.dumps(found, default=str))
    else:
        _print(found)


def describe(path: str, registry: Path | None = None) -> dict[str, Any]:
    """Plain data about what `path` names; "kind" says what it is. Raises BadInput."""
    from deltaw.store.describe import describe_adapter, describe_run, is_adapter, is_run

    try:
        folder = adapter_path(path, registry)
    except (NotFound, RegistryError):
        if "@" in path:
            raise
        folder = Path(path).expanduser()  # a base's name, perhaps
    if is_run(folder):
        return describe_run(folder)
    if is_adapter(folder):
        return describe_adapter(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise BadInput(
            f"{folder} is no adapter (adapter_config.json), no run (run.json) and no base (config.json).\n"
            f"  It holds: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}."
        )
    from deltaw.model.describe import describe_base

    return describe_base(path, say=lambda line: typer.echo(line, err=True))


def describe_machine() -> dict[str, Any]:
    """Processor, instruction sets, threads, which compiled kernels run, versions, what dtype "auto" means here."""
    import torch

    import deltaw
    from deltaw.model.base import best_dtype
    from deltaw.ops import native

    cpu = _cpu_info()
    return {
        "kind": "machine",
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_mb": _memory_mb(),
        "isa": [f for f in ISA_FLAGS if f in (cpu.get("flags") or cpu.get("Features") or "").split()],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "native_path": native.path(),
        "native_paths": list(native.paths()),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "auto_dtype": best_dtype(),
        "versions": {"deltaw": deltaw.__version__, "python": platform.python_version(), **_versions()},
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    first = path.read_text(encoding="utf-8").split("\n\n")[0]
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


def _memory_mb() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000
    except (AttributeError, ValueError, OSError):
        return None  # not told on this system


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# For people ------------------------------------------------------------------------------------------


def _print(found: dict[str, Any]) -> None:
    console = Console()
    nested = {k: found[k] for k in ("places", "linear_maps", "adapter") if found.get(k)}
    title = Text(f"{found['kind']} {found.get('path', '')}")
    table = Table(title=title, title_justify="left", show_header=False)
    for key, value in found.items():
        if key not in (*nested, "kind", "path"):
            table.add_row(key.replace("_", " "), Text(shown(value)))
    console.print(table)
    for rows in (nested.get("places"), nested.get("linear_maps")):
        if rows:
            console.print(_rows(rows))
    if "adapter" in nested:
        _print(nested["adapter"])


def _rows(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for key in rows[0]:
        table.add_column(key.replace("_", " "), justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*(Text(shown(value)) for value in row.values()))
    return table


def shown(value: Any) -> str:
    """A value for a table's cell; what is nested gets a line for each part."""
    if value is None or value in ({}, [], ()):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return "\n".join(f"{k}: {_inline(v)}" for k, v in value.items())
    if isinstance(value, list) and all(isinstance(v, dict) for v in value):
        return "\n".join(_inline(v) for v in value)
    if isinstance(value, list):
        return " ".join(shown(v) for v in value)
    return _inline(value)


def _inline(value: Any) -> str:
    """One line: hashes are cut, what is nested is JSON."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text[:SHORT] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
