"""Write a merged model as a plain transformers folder, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.errors import RunError, WorkFailed
from deltaw.merge.changes import Change, checked
from deltaw.merge.checkpoint import FLOATS, Planned, write_shards
from deltaw.merge.source import Source
from deltaw.model.quiet import quiet
from deltaw.store.files import write_text

PIECE = 1 << 24  # numbers that are compared at once
VOCABULARY = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
BESIDE = (
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "LICENSE.*",
    "LICENCE*",
    "NOTICE*",
)


@dataclass
class Tally:
    """What was written.

    n_changed    numbers that the adapter changes, in float32
    n_lost       those of them that the output's dtype rounds back to the base's value
    largest      the largest absolute change of a weight
    n_bytes      bytes of the weight files
    """

    n_tensors: int = 0
    n_tensors_changed: int = 0
    n_changed: int = 0
    n_lost: int = 0
    largest: float = 0.0
    n_bytes: int = 0
    untied: bool = False

    def add(self, before: Tensor, after: Tensor, written: Tensor) -> None:
        """Count one changed tensor; rows that are new do not count."""
        self.n_tensors_changed += 1
        n = before.shape[0]
        width = max(1, before.numel() // max(n, 1))
        step = max(1, PIECE // width)
        for i in range(0, n, step):
            rows = slice(i, min(n, i + step))
            old, new = before[rows].to(after.dtype), after[rows]
            changed = old != new
            self.n_changed += int(changed.sum())
            self.n_lost += int((changed & (before[rows].to(written.dtype) == written[rows])).sum())
            self.largest = max(self.largest, float((new - old).abs().max())) if old.numel() else self.largest


@dataclass(frozen=True)
class Output:
    """One tensor of the result: its name in the files, the base's tensor behind it, what happens to it."""

    key: str
    source: str
    change: Change | None
    shape: tuple[int, ...]
    dtype: torch.dtype | None = field(default=None)  # None: left as it is (integers)


def refuse_used(out: Path) -> None:
    """Raise RunError unless `out` is a folder that is not there yet, or empty."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        what = "holds something" if out.is_dir() else "is a file"
        raise RunError(f"{out} {what}: what is written here is a new folder.\n  Choose another --out, or empty it.")


def write_weights(
    source: Source, changes: Mapping[str, Change], folder: Path, dtype: torch.dtype | None, shard_bytes: int
) -> Tally:
    """Write the merged weights into `folder`; dtype None keeps each tensor's own.

    Raises WorkFailed when a value is not finite in the output's dtype.
    """
    tally = Tally()
    if source.loaded:
        return _write_loaded(source, changes, folder, dtype, shard_bytes, tally)
    outputs, tally.untied = _outputs(source, changes, dtype)
    entries = source.checkpoint.entries
    planned = []
    for out in outputs:
        entry = entries[out.source]
        n = torch.Size(out.shape).numel()
        size = n * torch.empty(0, dtype=out.dtype).element_size() if out.dtype else entry.size_bytes
        planned.append(Planned(out.key, size))

    def values() -> Iterator[tuple[str, Tensor]]:
        for out in outputs:
            yield out.key, _value(out.key, source.checkpoint.read(out.source), out.change, out.dtype, tally)

    tally.n_tensors = len(outputs)
    tally.n_bytes = write_shards(folder, planned, values(), shard_bytes)
    return tally


def _outputs(source: Source, changes: Mapping[str, Change], dtype: torch.dtype | None) -> tuple[list[Output], bool]:
    """Every tensor to write, and whether a tie of the base is cut."""
    entries = source.checkpoint.entries
    by_key = {source.keys[n]: changes[n] for n in changes if n in source.own}
    outputs = []

    def add(key: str, origin: str, change: Change | None) -> None:
        entry = entries[origin]
        shape = entry.shape if change is None else change.shape(entry.shape)
        own = FLOATS.get(entry.dtype)
        outputs.append(Output(key, origin, change, shape, None if own is None else dtype or own))

    for key in entries:
        add(key, key, by_key.get(key))
    untied = False
    for name, partners in source.ties.items():
        if stays_tied(name, partners, changes):
            continue
        untied = True
        owner = next((n for n in source.own if source.keys[n] == source.keys[name]), name)
        if name not in source.own and not _alike(changes.get(name), changes.get(owner)):
            add(name, source.keys[name], changes.get(name))
    return outputs, untied


def _alike(mine: Change | None, theirs: Change | None) -> bool:
    """Whether one stored tensor can still stand for both: T5's three embeddings, when the head goes its own way."""
    return mine is theirs is None or (mine is not None and mine.is_like(theirs))


def stays_tied(name: str, partners: tuple[str, ...], changes: Mapping[str, Change]) -> bool:
    """Whether one stored tensor can still stand for `name` and all its partners."""
    mine = changes.get(name)
    theirs = [changes.get(p) for p in partners]
    return all(t is None for t in theirs) if mine is None else all(mine.is_like(t) for t in theirs)


def _value(key: str, stored: Tensor, change: Change | None, dtype: torch.dtype | None, tally: Tally) -> Tensor:
    """The tensor to write; changed ones are counted."""
    if dtype is None:
        return stored
    value = stored if change is None else checked(key, change, stored)
    written = value.to(dtype).contiguous()
    if (change is not None or dtype != stored.dtype) and not bool(torch.isfinite(written).all()):
        raise WorkFailed(
            f"{key}: NaN or Inf in {str(dtype).removeprefix('torch.')}. Nothing was written; check the "
            "adapter, or choose --dtype bfloat16 or float32, which hold larger values."
        )
    if change is not None:
        tally.add(stored, value, written)
    return written


def _write_loaded(
    source: Source,
    changes: Mapping[str, Change],
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    tally: Tally,
) -> Tally:
    """The way through memory: change the loaded network's tensors, let transformers write it."""
    net = source.net
    cut = {n for n, partners in source.ties.items() if not stays_tied(n, partners, changes)}
    made: dict[str, nn.Parameter] = {}
    for name in [*changes, *sorted(cut - set(changes))]:
        shared = next((made[p] for p in source.ties.get(name, ()) if p in made and name not in cut), None)
        if shared is None:
            stored = source.read(name)
            value = _value(name, stored, changes.get(name), dtype or stored.dtype, tally)
            shared = nn.Parameter(value.clone(), requires_grad=False)
        made[name] = shared
    for name, parameter in made.items():
        owner, _, leaf = name.rpartition(".")
        setattr(net.get_submodule(owner), leaf, parameter)
    if cut:
        tally.untied = True
        net.config.get_text_config().tie_word_embeddings = net.config.tie_word_embeddings = False
    if dtype is not None:
        net.to(dtype)
    with quiet():
        net.save_pretrained(folder, max_shard_size=shard_bytes)
    tally.n_tensors = len(net.state_dict())
    tally.n_bytes = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    return tally


def write_config(
    base: Path,
    folder: Path,
    *,
    dtype: str,
    tied: bool | None,
    vocab_size: int | None,
    overrides: Mapping[str, Any] | None = None,
) -> None:
    """The base's config.json with what the merge changed; None leaves a value as it is.

    overrides  settings that the adapter needs, of the text model's part of the config
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for key in ("_name_or_path", "quantization_config"):
        config.pop(key, None)
    inner = config["text_config"] if isinstance(config.get("text_config"), dict) else None
    parts = [config] if inner is None else [config, inner]
    named = [key for part in parts for key in ("dtype", "torch_dtype") if key in part]
    for part in parts:
        part |= {key: dtype for key in ("dtype", "torch_dtype") if key in part}
    if not named:
        config["dtype"] = dtype
    if tied is not None:
        for part in parts:
            part["tie_word_embeddings"] = tied
    if vocab_size is not None:
        (config if inner is None else inner)["vocab_size"] = vocab_size
        if "vocab_size" in config:
            config["vocab_size"] = vocab_size
    (config if inner is None else inner).update(overrides or {})
    if "rope_parameters" in (overrides or {}):  # older files say it in other words, which would contradict
        for key in ("rope_scaling", "rope_theta"):
            (config if inner is None else inner).pop(key, None)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def write_beside(base: Path, folder: Path, tokenizer: Any) -> None:
    """Tokenizer (`tokenizer` when it has new tokens), chat template, generation settings, licence."""
    if tokenizer is not None:
        with quiet():
            tokenizer.save_pretrained(folder)
    for pattern in (*(() if tokenizer is not None else VOCABULARY), *BESIDE):
        for path in base.glob(pattern):
            if path.is_file() and not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    extra = base / "additional_chat_templates"
    if extra.is_dir() and not (folder / extra.name).exists():
        shutil.copytree(extra, folder / extra.name)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors makes them private
