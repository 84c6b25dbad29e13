"""deltaw export: adapters and merged models in other tools' files."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from deltaw.cli.references import RegistryOption, adapter_path

if TYPE_CHECKING:
    from deltaw.export.llama_cpp import GgufReport
    from deltaw.export.peft import FolderReport

app = typer.Typer(no_args_is_help=True)

Base = Annotated[str, typer.Option(help="A folder, a hub id, a .gguf file or a starter name.")]
AdapterPath = Annotated[str, typer.Option(help="Folder of an adapter or of a run, or NAME[@V] in the registry.")]
OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Export although the adapter comes from another base.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def export() -> None:
    """Write an adapter, or a merged model, as another tool's files."""


@app.command()
def gguf(
    base: Base,
    out: Annotated[str, typer.Option(help="The file to write; it must not be there yet.")],
    adapter: Annotated[
        str | None, typer.Option(help="Folder of an adapter or of a run, or NAME[@V] in the registry.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model, not the adapter alone.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or bfloat16; by default float32 for an adapter, the base's for a model."),
    ] = None,
    allow_other_base: OtherBase = False,
    registry: RegistryOption = None,
    as_json: Json = False,
) -> None:
    """Write a LoRA for llama.cpp; with --merged a whole model. What GGUF cannot say is named first."""
    from deltaw.export.llama_cpp import export_gguf

    folder = None if adapter is None else adapter_path(adapter, registry)
    report = export_gguf(
        base, out, adapter=folder, merged=merged, dtype=dtype, allow_other_base=allow_other_base, say=_say
    )
    about = f"alpha {report.alpha:g}, {report.n_folded} scales in B" if report.kind == "adapter" else report.tokenizer
    _print(report, f"{report.architecture} {report.kind}, {report.dtype}, {report.n_tensors} tensors, {about}", as_json)


@app.command()
def peft(
    adapter: AdapterPath,
    out: Annotated[str, typer.Option(help="The folder to write; it must not be there yet.")],
    registry: RegistryOption = None,
    as_json: Json = False,
) -> None:
    """Write a folder for PEFT alone: every scale as alpha / rank, no file of deltaw's."""
    from deltaw.export.peft import export_peft

    report = export_peft(adapter_path(adapter, registry), out)
    _print(report, f"{report.method}, {report.n_tensors} tensors", as_json)


@app.command()
def vllm(
    base: Base,
    adapter: AdapterPath,
    out: Annotated[str, typer.Option(help="The folder to write; it must not be there yet.")],
    max_rank: Annotated[int | None, typer.Option(help="The server's --max-lora-rank.")] = None,
    allow_other_base: OtherBase = False,
    registry: RegistryOption = None,
    as_json: Json = False,
) -> None:
    """Write a folder that vLLM and LoRAX load: one rank, one alpha. What they do not load is named first."""
    from deltaw.export.vllm import export_vllm

    folder = adapter_path(adapter, registry)
    report = export_vllm(base, folder, out, max_rank=max_rank, allow_other_base=allow_other_base, say=_say)
    told = f"rank {report.rank}, alpha {report.alpha:g}; serve with --max-lora-rank {max_rank or report.max_lora_rank}"
    _print(report, told, as_json)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print(report: GgufReport | FolderReport, told: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        typer.echo(f"{report.out}: {told}, {report.size_bytes / 1e6:,.1f} MB")
