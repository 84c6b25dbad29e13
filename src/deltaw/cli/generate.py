"""`deltaw generate`."""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated

import typer

from deltaw.cli.eval import (
    AdapterOption,
    BaseOption,
    BlockOption,
    DeviceOption,
    DoubleOption,
    DtypeOption,
    FormatOption,
    OtherBaseOption,
)
from deltaw.cli.references import RegistryOption, adapter_path


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer with --chat.")],
    base: BaseOption,
    adapter: AdapterOption = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 128,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the chat template, as an adapter trained so does.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=-(2**63), max=2**63 - 1, help="Of the random stream.")] = 0,
    dtype: DtypeOption = "auto",
    format: FormatOption = "dense",
    block: BlockOption = 64,
    double_quant: DoubleOption = False,
    device: DeviceOption = "cpu",
    allow_other_base: OtherBaseOption = False,
    registry: RegistryOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, nothing else.")] = False,
) -> None:
    """Answer a prompt with a base, or with a base and an adapter; of a text classifier, print its label."""
    from deltaw.data.source import Row
    from deltaw.data.template import prompt_ids
    from deltaw.model.base import labels_for, load_base
    from deltaw.model.classify import label_scores
    from deltaw.model.generate import Sampling
    from deltaw.model.generate import generate as continue_
    from deltaw.train.evaluate import data_spec

    say = partial(typer.echo, err=True)
    folder = None if adapter is None else adapter_path(adapter, registry)
    own = labels_for(base, folder, None)
    model = load_base(base, format, dtype, say, block=block, double_quant=double_quant, labels=own, device=device)
    if folder is not None:
        model.attach(folder, allow_other_base=allow_other_base)
    row = Row(prompt=prompt, completion="", source="the prompt,")
    ids = prompt_ids(row, model.tokenizer, data_spec(model, "chat" if chat else None, 2048), model.task)
    if model.kind == "classify":
        scores = label_scores(model, [ids])[0].exp().tolist()
        shares = dict(zip(model.task.labels, scores, strict=True))
        label = max(shares, key=shares.__getitem__)
        typer.echo(json.dumps({"text": label, "labels": shares, "prompt_tokens": len(ids)}) if as_json else label)
        return
    tokens = continue_(model, [ids], max_tokens, sampling=Sampling(temperature, top_p, seed))[0]
    text = model.tokenizer.decode(tokens, skip_special_tokens=True)
    if as_json:
        typer.echo(json.dumps({"text": text, "tokens": len(tokens), "prompt_tokens": len(ids)}))
    else:
        typer.echo(text.strip())
        if not tokens:
            say("The answer is empty: the model ended it with its first token.")
