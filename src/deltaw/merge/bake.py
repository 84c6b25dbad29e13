"""Bake an adapter into its base: a plain transformers folder that needs nothing of ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from deltaw.core.adapter import Adapter
from deltaw.core.fingerprint import VOCABULARIES, BaseFingerprint, fingerprint_folder
from deltaw.errors import AdapterError, BadInput, NotMergeable, near
from deltaw.merge.changes import changes_of, grown_vocabulary
from deltaw.merge.checkpoint import SHARD_BYTES, Checkpoint
from deltaw.merge.probe import Probe, compare_folder, probe_text, unmerged_logits
from deltaw.merge.quantise import requantise
from deltaw.merge.rounded import RoundedCheckpoint
from deltaw.merge.source import Source
from deltaw.merge.write import Tally, refuse_used, write_beside, write_config, write_weights
from deltaw.model.identity import compare
from deltaw.model.kinds import head_config
from deltaw.model.load import DTYPES, folder_format, load_tokenizer, resolve_base
from deltaw.model.quantised import Format
from deltaw.model.vocabulary import with_tokens
from deltaw.store.files import whole_folder
from deltaw.store.peft import read_adapter

INTO = ("dense", "dequantised", "quantised")
OUT_DTYPES = ("float32", "bfloat16", "float16")

Say = Callable[[str], None]


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote and how near it is.

    dtype             of the weights that were written (of those that are dense)
    into              "dense", "dequantised" or "quantised"
    format            "dense", or how the written linear maps are quantised
    route             "shards": tensor by tensor; "loaded": through the network in memory
    untied            whether the head and the embedding had to be written apart
    new_tokens        added to the vocabulary
    n_weights_changed numbers that differ from the base in float32
    lost_share        share of those that the dtype rounds back to the base's value
    largest_change    largest absolute change of a weight
    probe             logits against the unmerged model; None when it was not asked for
    size_bytes        of the weight files
    """

    out: str
    base: str
    adapter: str
    method: str
    dtype: str
    into: str
    format: str
    route: str
    untied: bool
    new_tokens: tuple[str, ...]
    n_tensors: int
    n_tensors_changed: int
    n_weights_changed: int
    lost_share: float
    largest_change: float
    probe: Probe | None
    size_bytes: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def bake(
    base: str | Path,
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    dtype: str | None = None,
    allow_other_base: bool = False,
    text: str | None = None,
    say: Say | None = None,
    measure: bool = True,
    shard_bytes: int = SHARD_BYTES,
    into: str = "dense",
) -> MergeReport:
    """Write base + adapter as a plain transformers folder, whole or not at all.

    Sums are in float32; at most one shard of the result is in memory, unless `measure` loads both models.

    base     a folder in Hugging Face layout, a hub id, a .gguf file, or a starter name
    adapter  an Adapter or the folder of one
    out      a folder that is not there yet, or empty
    dtype    "float32", "bfloat16", "float16"; None: what each tensor of the checkpoint has
    text     what the logits are compared on; None: a page of Jane Austen
    say      called with a sentence before each long step
    measure  load the unmerged model and the result and compare their logits
    into     "dense": the base at full precision; "dequantised": what the quantised base that the adapter was trained
             on computes with, written dense; "quantised": that, quantised again, which rounds the change and is
             therefore always measured

    Raises NotMergeable, BaseMismatch, AdapterError, BaseError, RunError (`out` holds something), WorkFailed
    (NaN or Inf, a full disk).
    """
    started = time.monotonic()
    out = Path(out)
    refuse_used(out)
    if dtype is not None and dtype not in OUT_DTYPES:
        raise BadInput(f"unknown dtype {dtype!r}.{near(dtype, OUT_DTYPES)} Known: {', '.join(OUT_DTYPES)}.")
    if not isinstance(adapter, Adapter):
        adapter = read_adapter(Path(adapter))
    refuse_unmergeable(adapter)
    if into == "quantised" and not measure:
        raise BadInput("a merge into quantised weights loses precision: it is not done without measuring how much.")
    folder = resolve_base(base, say=say)
    fingerprint = fingerprint_folder(folder)
    how = _format_of(folder, adapter, into)
    meant = fingerprint if how is None else fingerprint.model_copy(update={"format": str(how)})
    compare(adapter.fingerprint, meant, allow_other_base)
    words = None if not measure else probe_text() if text is None else text
    opened = (
        Checkpoint(folder)
        if how is None
        else RoundedCheckpoint(folder, how, fingerprint.dtype, adapter.provenance.get("labels") or None)
    )
    with opened as checkpoint, torch.no_grad():
        source = Source(folder, checkpoint, adapter, fingerprint.dtype, how)
        job = _Job(folder, fingerprint, adapter, source, dtype, say or (lambda line: None), into, how)
        tally, probe = job.write(out, words, shard_bytes)
    return job.report(out, tally, probe, time.monotonic() - started)


@dataclass(frozen=True)
class _Job:
    """One merge whose inputs are read and known to be usable."""

    folder: Path
    fingerprint: BaseFingerprint
    adapter: Adapter
    source: Source
    dtype: str | None
    say: Say
    into: str
    how: Format | None

    @property
    def written_dtype(self) -> str:
        return self.dtype or self.fingerprint.dtype

    def write(self, out: Path, words: str | None, shard_bytes: int) -> tuple[Tally, Probe | None]:
        """Write the folder; compare logits on `words` unless they are None."""
        source, adapter = self.source, self.adapter
        if source.loaded:
            self.say(
                f"the files do not hold {source.missing[0]} by that name: loading the whole model "
                "with transformers instead of merging shard by shard"
            )
        made, places = source.match(adapter)
        changes = changes_of(made, places, source.ties)
        vocab_size = grown_vocabulary(changes, source.net)
        tokenizer = _tokenizer(self.folder)
        grown = grown_tokenizer(tokenizer, adapter)
        expected = probe = None
        if words is not None:
            self.say("computing logits of the unmerged model")
            expected = unmerged_logits(self.folder, adapter, tokenizer, words, self.how)
        with whole_folder(out) as aside:
            self.say(f"writing {self.written_dtype} weights")
            dtype = DTYPES[self.dtype] if self.dtype else None
            tally = write_weights(source, changes, aside, dtype, shard_bytes)
            tied = False if (tally.untied or source.contradicts_tie) and source.kind != "seq2seq" else None
            write_config(
                self.folder,
                aside,
                dtype=self.written_dtype,
                tied=tied,
                vocab_size=vocab_size,
                overrides={**adapter.overrides, **head_config(source.net)},
            )
            write_beside(self.folder, aside, grown)
            if self.into == "quantised" and self.how is not None:
                self.say(f"quantising the merged weights to {self.how}")
                tally.n_bytes = requantise(aside, self.how, self.written_dtype, shard_bytes)
            if expected is not None:
                self.say("computing logits of the merged model")
                ids, wanted, kind = expected
                probe = compare_folder(aside, self.written_dtype, ids, wanted, kind)
            refuse_used(out)  # by another process, in the meantime
        return tally, probe

    def report(self, out: Path, tally: Tally, probe: Probe | None, seconds: float) -> MergeReport:
        """What `write` did."""
        return MergeReport(
            out=str(out),
            base=self.fingerprint.short(),
            adapter=self.adapter.id,
            method=self.adapter.spec.name,
            dtype=self.written_dtype,
            into=self.into,
            format=str(self.how) if self.into == "quantised" else "dense",
            route="loaded" if self.source.loaded else "shards",
            untied=tally.untied,
            new_tokens=self.adapter.spec.new_tokens,
            n_tensors=tally.n_tensors,
            n_tensors_changed=tally.n_tensors_changed,
            n_weights_changed=tally.n_changed,
            lost_share=tally.n_lost / max(tally.n_changed, 1),
            largest_change=tally.largest,
            probe=probe,
            size_bytes=tally.n_bytes,
            seconds=round(seconds, 3),
        )


def _format_of(folder: Path, adapter: Adapter, into: str) -> Format | None:
    """The format that linear maps are rounded to before the change is added; None: they are not.

    Raises BadInput for an unknown `into`, NotMergeable where it and the base do not go together.
    """
    if into not in INTO:
        raise BadInput(f"unknown --into {into!r}.{near(into, INTO)} Known: {', '.join(INTO)}.")
    saved = folder_format(folder)
    if into == "dense":
        if saved is not None:
            raise NotMergeable(
                f"{folder} holds {saved.name} weights: writing a change into them would round it away.\n"
                "  Merge into the 16- or 32-bit model that it was made from; or, with --into dequantised, into what "
                "its weights stand for, written dense; or, with --into quantised, quantise the sum again."
            )
        return None
    trained_on = adapter.fingerprint.format if adapter.fingerprint else "unknown"
    how = saved or Format.parse(trained_on)
    if how is None:
        raise NotMergeable(
            f"--into {into}: neither is {folder} quantised, nor was the adapter trained on a quantised base (its "
            f"format is {trained_on}).\n  Merge with --into dense, or give a folder that deltaw quantize wrote."
        )
    return how


def refuse_unmergeable(adapter: Adapter) -> None:
    """Raise NotMergeable for a method whose change no weights can hold."""
    spec = adapter.spec
    if spec.trains_base:
        raise NotMergeable(
            f"Method {spec.name!r} trains the base itself: its result is a whole model already, "
            "there is nothing to merge."
        )
    if not spec.mergeable:
        raise NotMergeable(f"The change of method {spec.name!r} cannot be written into a base's weights.")


def _tokenizer(folder: Path) -> Any:
    """The base's tokenizer, or None when its folder holds none."""
    if any((folder / name).is_file() for name in ("tokenizer.json", *VOCABULARIES)):
        return load_tokenizer(folder)
    return None


def grown_tokenizer(tokenizer: Any, adapter: Adapter) -> Any:
    """A tokenizer that knows the adapter's new tokens, or None when it has none."""
    tokens = adapter.spec.new_tokens
    if not tokens:
        return None
    grown, ids = with_tokens(tokenizer, tokens)
    for r in adapter.replaced:
        if r.rows is not None and sorted(ids) != sorted(r.rows):
            raise AdapterError(
                f"The adapter's new tokens {list(tokens)} are numbers {sorted(ids)} in this vocabulary, "
                f"but its rows of {r.tensor} are numbers {sorted(r.rows)}: it belongs to another tokenizer."
            )
    return grown
