"""GGUF for llama.cpp: an adapter to load beside a base, or a whole model.

An adapter's file holds lora_a and lora_b of each map and one alpha; llama.cpp adds alpha / rank * B A, the rank read
off the tensors (struct llama_adapter_lora_weight). Scales that differ are folded into B, so that every map gets exactly
its own: rsLoRA, alphas and ranks by map. What no pair of factors says (DoRA's gains, biases, replaced tensors, vectors
in front of the sequence) is named and refused before anything is written; a whole model can hold most of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.misfits import some
from deltaw.errors import AdapterError, BadInput, BaseError
from deltaw.export.factors import common_alpha, factors_of, folded, refuse_empty
from deltaw.export.families import Layout, config_problems, layout_of, rope_factors, settings_of
from deltaw.export.gguf_file import FILE_TYPES, Entry, check_dtype, write_gguf
from deltaw.export.opened import Opened, Say, instead, opened, refuse, refuse_taken
from deltaw.export.vocabulary import Vocabulary, vocabulary_of
from deltaw.merge.bake import grown_tokenizer, refuse_unmergeable
from deltaw.merge.changes import Change, changes_of, checked, grown_vocabulary
from deltaw.merge.write import stays_tied
from deltaw.model.load import load_tokenizer

MERGE = "Write the whole model instead: deltaw export gguf --merged."
HEAD = "lm_head.weight"
Settings = list[tuple[str, tuple[Any, ...]]]


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    kind          "adapter" or "model";  architecture  `general.architecture`
    alpha         `adapter.lora.alpha`; None in a model
    n_folded      maps whose own scale went into B, since the file has one alpha
    tokenizer     `tokenizer.ggml.model` and `.pre` of a model, "gpt2/smollm"; None in an adapter
    writer        which program made the file
    """

    out: str
    kind: str
    architecture: str
    dtype: str
    base: str
    adapter: str | None
    alpha: float | None
    n_folded: int
    tokenizer: str | None
    n_tensors: int
    size_bytes: int
    writer: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def export_gguf(
    base: str | Path,
    out: str | Path,
    *,
    adapter: str | Path | Adapter | None = None,
    merged: bool = False,
    dtype: str | None = None,
    allow_other_base: bool = False,
    say: Say | None = None,
) -> GgufReport:
    """Write a GGUF file that llama.cpp loads, whole or not at all; one tensor is in memory at a time.

    base     a folder in Hugging Face layout, a hub id, a .gguf file, or a starter name
    out      a file that is not there yet
    adapter  an Adapter or the folder of one; alone it is written as a LoRA for `base`
    merged   write the whole model: the base, with the adapter in its weights where there is one
    dtype    of matrices: "float32", "float16" or "bfloat16"; None: float32 for an adapter, what the base has for a
             model. Norms, biases and positions are float32

    Sums are in float32. Raises AdapterError (the format cannot say what the adapter does: all of it is listed),
    NotMergeable, BaseMismatch, BaseError (an architecture or a tokenizer that is not known here), BadInput, RunError
    (`out` is there), WorkFailed (NaN or Inf, a full disk).
    """
    started = time.monotonic()
    out = Path(out)
    refuse_taken(out)
    if dtype is not None:
        check_dtype(dtype)
    if adapter is None and not merged:
        raise BadInput("an adapter or --merged is needed: there is nothing to write.")
    with opened(base, adapter, allow_other_base, say) as found:
        if found.source.kind != "causal":
            raise BaseError(f"{found.folder} is no causal language model: deltaw writes no GGUF for it.")
        config = {**found.source.net.config.to_dict(), **(found.adapter.overrides if found.adapter and merged else {})}
        layout = layout_of(config)
        write = _Model if merged else _Lora
        if dtype is None:
            dtype = found.fingerprint.dtype if merged and found.fingerprint.dtype in FILE_TYPES else "float32"
        job = write(found, layout, dtype)
        job.prepare()
        if say:
            say(f"writing {dtype} tensors")
        size = write_gguf(out, layout.family.arch, job.settings, job.entries, job.values())
    return GgufReport(
        out=str(out),
        kind=job.kind,
        architecture=layout.family.arch,
        dtype=dtype,
        base=found.fingerprint.short(),
        adapter=None if found.adapter is None else found.adapter.id,
        alpha=job.alpha,
        n_folded=job.n_folded,
        tokenizer=job.tokenizer,
        n_tensors=len(job.entries),
        size_bytes=size,
        writer="gguf.GGUFWriter",
        seconds=round(time.monotonic() - started, 3),
    )


class _Job:
    """One file: what `prepare` decides, and `values` gives for each of `entries`. Nothing is written before."""

    kind = ""

    def __init__(self, found: Opened, layout: Layout, dtype: str) -> None:
        self.found, self.layout, self.dtype = found, layout, dtype
        self.settings: Settings = []
        self.entries: list[Entry] = []
        self.alpha: float | None = None
        self.n_folded = 0
        self.tokenizer: str | None = None

    def prepare(self) -> None:
        """Decide everything, or raise."""
        raise NotImplementedError

    def values(self) -> Iterator[Tensor]:
        """The tensors in float32, in the order of `entries`."""
        raise NotImplementedError

    def _about(self) -> Settings:
        """Name and origin."""
        found = self.found
        about: Settings = [("name", (found.fingerprint.name,)), ("string", ("deltaw.base", found.fingerprint.weights))]
        if found.adapter is not None:
            about.append(("string", ("deltaw.adapter", found.adapter.id)))
        return about


class _Lora(_Job):
    """An adapter's file."""

    kind = "adapter"

    def prepare(self) -> None:
        base = self.found
        self.factors, problems = factors_of(base)
        tied = {p for name, partners in base.source.ties.items() for p in (name, *partners)}
        names = [self.layout.lora_name_of(f"{f.site.name}.weight") for f in self.factors]
        ends = [f.site.name for f in self.factors if f"{f.site.name}.weight" in tied]
        if ends:
            problems.append(
                f"{some(ends)}: embedding and head are one tensor in this base, and llama.cpp would change both"
            )
        if nameless := [f.site.name for f, name in zip(self.factors, names, strict=True) if name is None]:
            problems.append(f"llama.cpp adds no LoRA at {some(nameless, most=12)}")
        assert base.adapter is not None
        what = "A GGUF adapter cannot say what this adapter does"
        refuse(problems, what, instead(base.adapter, MERGE), AdapterError)
        refuse_empty(self.factors)
        self.alpha = common_alpha(self.factors)
        self.n_folded = sum(f.alpha != self.alpha for f in self.factors)
        dtype = check_dtype(self.dtype)
        for f, name in zip(self.factors, names, strict=True):
            shape = tuple(f.A.shape[::-1] if f.site.kind == "embedding" else f.A.shape)
            self.entries.append(Entry(f"{name}.lora_a", shape, dtype))
            self.entries.append(Entry(f"{name}.lora_b", tuple(f.B.shape), dtype))
        self.settings = [
            ("type", ("adapter",)),
            ("string", ("adapter.type", "lora")),
            ("float32", ("adapter.lora.alpha", self.alpha)),
            *self._about(),
        ]

    def values(self) -> Iterator[Tensor]:
        assert self.alpha is not None
        for f in self.factors:
            name = self.layout.lora_name_of(f"{f.site.name}.weight") or ""
            yield f.A.T if f.site.kind == "embedding" else f.A
            yield self.layout.rows(name, folded(f, self.alpha, f.rank))


@dataclass(frozen=True)
class _Part:
    """A tensor of the network, and what happens to it."""

    tensor: str
    name: str
    change: Change | None
    transposed: bool


class _Model(_Job):
    """A whole model's file."""

    kind = "model"

    def prepare(self) -> None:
        source, adapter, layout = self.found.source, self.found.adapter, self.layout
        changes: dict[str, Change] = {}
        tokenizer = load_tokenizer(self.found.folder)
        if adapter is not None:
            refuse_unmergeable(adapter)
            changes = changes_of(*source.match(adapter), source.ties)
            grown_vocabulary(changes, source.net)
            tokenizer = grown_tokenizer(tokenizer, adapter) or tokenizer
        problems = config_problems(layout)
        self.parts: list[_Part] = []
        nameless, absent = [], []
        for tensor in source.tensors:
            name = layout.name_of(tensor)
            if tensor not in source.keys and not source.loaded:
                absent.append(tensor)
            elif self._is_tied_head(tensor, changes):
                continue
            elif name is None:
                nameless.append(tensor)
            else:
                site = source.sites.get(tensor.removesuffix(".weight"))
                conv = tensor.endswith(".weight") and site is not None and site.kind == "conv1d"
                self.parts.append(_Part(tensor, name, changes.get(tensor), conv))
        if absent:
            problems.append(f"its files name tensors in another way than its network: {some(absent)}")
        if nameless:
            problems.append(f"llama.cpp has no tensor for {some(nameless, most=12)}")
        self._plan(tokenizer, problems)

    def _is_tied_head(self, tensor: str, changes: dict[str, Change]) -> bool:
        """Whether llama.cpp gets the tensor as a copy of the embedding's, and need not be given it."""
        partners = self.found.source.ties.get(tensor)
        return tensor == HEAD and partners is not None and stays_tied(tensor, partners, changes)

    def _plan(self, tokenizer: Any, problems: list[str]) -> None:
        dtype, source = check_dtype(self.dtype), self.found.source
        for part in self.parts:
            shape = tuple(source.tensors[part.tensor].shape)
            shape = shape if part.change is None else part.change.shape(shape)
            shape = shape[::-1] if part.transposed else shape
            fine = len(shape) == 1 or part.name == "position_embd.weight"  # llama.cpp computes with these in float32
            self.entries.append(Entry(part.name, shape, torch.float32 if fine else dtype))
        n_rows = next((e.shape[0] for e in self.entries if e.name == "token_embd.weight"), 0)
        words, odd = vocabulary_of(tokenizer, n_rows, self.layout.config)
        merge = "deltaw merge writes a folder for transformers and vLLM."
        refuse([*problems, *odd], f"{self.found.folder} cannot be written as GGUF", merge, BaseError)
        assert words is not None
        self.tokenizer = f"{words.model}/{words.pre}"
        self.extra = rope_factors(self.layout)
        if self.extra is not None:
            self.entries.append(Entry("rope_freqs.weight", tuple(self.extra.shape), torch.float32))
        self.settings = [
            ("type", ("model",)),
            *self._about(),
            ("file_type", (FILE_TYPES[self.dtype],)),
            ("vocab_size", (n_rows,)),
            *((method, (value,)) for method, value in settings_of(self.layout)),
            *_told(words),
        ]

    def values(self) -> Iterator[Tensor]:
        for part in self.parts:
            stored = self.found.source.read(part.tensor)
            value = stored.float() if part.change is None else checked(part.tensor, part.change, stored)
            yield self.layout.lay_out(part.name, value.T if part.transposed else value)
        if self.extra is not None:
            yield self.extra


def _told(words: Vocabulary) -> Settings:
    """A tokenizer's settings for the writer."""
    told: Settings = [
        ("tokenizer_model", (words.model,)),
        ("tokenizer_pre", (words.pre,)),
        ("token_list", (words.tokens,)),
        ("token_types", (words.types,)),
    ]
    if words.scores is not None:
        told.append(("token_scores", (words.scores,)))
    if words.merges is not None:
        told.append(("token_merges", (words.merges,)))
    told += [(f"{role}_token_id", (number,)) for role, number in words.special.items()]
    told += [("add_bos_token", (words.add_bos,)), ("add_eos_token", (words.add_eos,))]
    told.append(("add_space_prefix", (words.space_prefix,)))
    if words.chat_template:
        told.append(("chat_template", (words.chat_template,)))
    return told
