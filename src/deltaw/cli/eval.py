"""`deltaw eval`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from deltaw.cli.references import RegistryOption, adapter_path

BaseOption = Annotated[str, typer.Option("--base", help="Folder, hub id, .gguf file or starter name.")]
AdapterOption = Annotated[
    str | None, typer.Option("--adapter", help="Folder of a saved adapter or of a run, or a reference in a registry.")
]
OtherBaseOption = Annotated[bool, typer.Option("--allow-other-base", help="Attach although the base differs.")]
FormatOption = Annotated[str, typer.Option(help="dense: as the base has it; nf4, fp4, int4, int8: quantise it first.")]
BlockOption = Annotated[int, typer.Option(help="Of a quantised format: values that share a scale.")]
DoubleOption = Annotated[bool, typer.Option("--double-quant", help="Of a quantised format: scales in 8 bits too.")]
DtypeOption = Annotated[str, typer.Option(help="float32, bfloat16, ..., or auto: bfloat16 where the CPU has it.")]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, or cuda:N.")]


def evaluate(
    base: BaseOption,
    data: Annotated[str, typer.Option(help="Rows: a JSONL file, or what `datasets` reads (hf:NAME, .parquet, .csv).")],
    metric: Annotated[str, typer.Option(help="exact, json, choice or perplexity.")],
    adapter: AdapterOption = None,
    labels: Annotated[Path | None, typer.Option(help="JSON list of labels, for choice or for an encoder.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    dtype: DtypeOption = "auto",
    format: FormatOption = "dense",
    block: BlockOption = 64,
    double_quant: DoubleOption = False,
    device: DeviceOption = "cpu",
    template: Annotated[str | None, typer.Option(help="plain or chat; the adapter's own by default.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest document, in tokens.")] = 2048,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer, in tokens.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Write every answer to this JSONL file.")] = None,
    allow_other_base: OtherBaseOption = False,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Measure a base, or a base with an adapter, on rows."""
    from deltaw.data.source import read_rows
    from deltaw.data.task import read_labels
    from deltaw.errors import DataError, RecipeError
    from deltaw.model.base import labels_for, load_base
    from deltaw.store.files import write_text
    from deltaw.train.evaluate import check_metric, data_spec, evaluate_rows

    check_metric(metric)
    if metric == "perplexity" and (predictions or max_new_tokens):
        raise RecipeError("Metric perplexity generates nothing: remove --predictions and --max-new-tokens.")
    if predictions is not None and not predictions.parent.is_dir():
        raise DataError(f"--predictions: the folder {predictions.parent} does not exist.")
    if predictions is not None:
        write_text(predictions, "")  # a place that cannot be written to is said before the work
    rows = read_rows(data)[:limit]
    names = read_labels(labels) if labels else None
    say = partial(typer.echo, err=True)
    folder = None if adapter is None else adapter_path(adapter, registry)
    own = labels_for(base, folder, names)
    if names and not own and metric != "choice":
        say(f"note: --labels is for metric choice and for encoders; metric {metric} does not look at it")
    model = load_base(base, format, dtype, say, block=block, double_quant=double_quant, labels=own, device=device)
    if folder is not None:
        model.attach(folder, allow_other_base=allow_other_base)
    result = evaluate_rows(
        model,
        rows,
        metric,
        data_spec(model, template, max_tokens),
        labels=names,
        max_new_tokens=max_new_tokens,
        predictions=predictions is not None,
    )
    if predictions is not None:
        lines = [json.dumps(p, ensure_ascii=False) for p in result.pop("predictions", [])]
        write_text(predictions, "\n".join(lines) + "\n")
    cut = f" ({result['rows_cut']} cut to {max_tokens} tokens)" if result.get("rows_cut") else ""
    plain = f"{metric} {result['value']:.4f} on {result['n']} rows{cut} in {result['seconds']:.1f} s"
    typer.echo(json.dumps({**result, "base": base, "adapter": adapter}) if as_json else plain)
