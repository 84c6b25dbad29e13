"""A transformers model wearing adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.core.adapter import Adapter
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.site import LinearSite, VirtualSite
from deltaw.core.spec import MethodSpec
from deltaw.core.weight import Weight
from deltaw.data.pack import Batch
from deltaw.data.task import Task
from deltaw.errors import AdapterError, DeltawError, NotFound, SpecError, near
from deltaw.formats import BlockwiseWeight
from deltaw.formats.dense import DenseWeight
from deltaw.model.attachment import Attachment, Beside, fresh
from deltaw.model.calibrate import input_directions
from deltaw.model.classify import documents_of
from deltaw.model.computes import Computes
from deltaw.model.frozen import FrozenLinear
from deltaw.model.host import Run
from deltaw.model.identity import compare
from deltaw.model.install import Installed
from deltaw.model.kinds import NAMES, kind_of, labels_of, refuse_idle_embedding, with_head
from deltaw.model.load import refuse_unsupported
from deltaw.model.places import Places
from deltaw.model.rescale import Overrides
from deltaw.model.sites import find_sites
from deltaw.model.strict import strict
from deltaw.model.vocabulary import add_rows, with_tokens
from deltaw.ops.arena import Arena
from deltaw.store.peft import read_adapter


def _weight(module: nn.Module, site: LinearSite) -> Weight:
    """The frozen matrix of one linear map."""
    if isinstance(module, FrozenLinear):
        return module.frozen
    assert isinstance(module.weight, Tensor)
    return DenseWeight(module.weight, site.kind != "linear")


class Model(Computes):
    """A base model that adapters can be attached to. The base's weights are never written.

    net          the transformers model; its own modules are back after `detach`
    tokenizer    its tokenizer (with the new tokens of an attached adapter), or None
    kind         "causal", "seq2seq" (an encoder-decoder) or "classify" (an encoder with a head)
    fingerprint  which base this is, or None for a model made in memory
    folder       where the base came from, or None
    originals    a linear map's name -> its W [out, in] from before the base was quantised; None where it was not
    """

    def __init__(
        self,
        net: PreTrainedModel,
        tokenizer: Any = None,
        fingerprint: BaseFingerprint | None = None,
        folder: Path | None = None,
    ) -> None:
        self.net = net.eval().requires_grad_(False)
        self.kind = kind_of(net)
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.folder = folder
        self.originals: Callable[[str], Tensor] | None = None
        self.run = Run()
        self.arena = Arena()
        self.adapters: dict[str, Attachment] = {}
        self._own_tokenizer = tokenizer
        modules = dict(net.named_modules())
        sites = find_sites(net)
        weights = {n: _weight(modules[n], s) for n, s in sites.items()}
        biases = {n: getattr(modules[n], "bias", None) for n in sites}
        self.places = Places.of(net, sites, weights, biases, modules)
        self._base_tensors = dict(net.named_parameters(remove_duplicate=False))
        self._overrides = Overrides(net)
        self.installed = Installed(self.places, self.run, self._base_tensors)

    # Attach, use, detach ------------------------------------------------------------------------

    def attach(
        self,
        what: MethodSpec | Adapter | str | Path,
        name: str = "default",
        *,
        trainable: bool = False,
        allow_other_base: bool = False,
        seed: int = 0,
        calibration: Sequence[Batch] = (),
    ) -> str:
        """Attach a new trainable adapter (from settings) or a finished one (strictly), and use it.

        what              a method's settings; or an Adapter; or the folder of a saved one
        trainable         whether a finished adapter goes on training
        allow_other_base  attach although the base differs from the one it was trained on
        seed              for fresh parameters
        calibration       rows that fresh parameters may start from (LoRA's start: eva)
        returns           `name`

        Raises AdapterError or TargetError; the model is then as it was.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(f"An adapter's name is a word, not {name!r}.")
        if not isinstance(what, MethodSpec | Adapter | str | Path):
            hint = " Pass settings, as in Lora(rank=16), not the class." if isinstance(what, type) else ""
            raise AdapterError(f"Cannot attach {what!r}: give a method's settings, an Adapter or a folder.{hint}")
        if name in self.adapters:
            raise AdapterError(f"An adapter called {name!r} is attached already. Detach it, or pass another name.")
        if any(a.spec.trains_base for a in self.adapters.values()):
            raise AdapterError("This model trains its own weights (method 'full'): nothing can be attached to it.")
        if isinstance(what, MethodSpec):
            self._refuse_format(what)
            made = self._fresh(what, seed, calibration)
        else:
            adapter = what if isinstance(what, Adapter) else read_adapter(Path(what))
            if adapter.spec.trains_base:
                raise AdapterError("A fully fine-tuned model is a base of its own: load it with load_base.")
            made = self._matched(adapter, allow_other_base)
            made.trainable = trainable
            if made.spec.new_tokens:
                self._take_tokens(made.spec.new_tokens, made)
            for tensor in made.tensors().values():
                if trainable:
                    tensor.data = tensor.data.float()  # training is in float32 whatever the file held
            for tensor in made.parameters().values():
                tensor.requires_grad_(trainable)
        made.to(self.device)
        self.adapters[name] = made
        self.installed.install(name, made)
        try:
            self.use(name)
        except DeltawError:
            self.detach(name)
            raise
        return name

    def _matched(self, adapter: Adapter, allow_other_base: bool) -> Attachment:
        compare(adapter.fingerprint, self.fingerprint, allow_other_base)
        made = strict(adapter, self.places, self._base_tensors)
        self._refuse_fused(made)
        return made

    def matched(self, adapter: Adapter, allow_other_base: bool = False) -> tuple[Attachment, Any]:
        """A finished adapter matched with this model, strictly, and the base's tokenizer with its new tokens.

        Nothing is attached. Raises AdapterError as `attach` does.
        """
        made = self._matched(adapter, allow_other_base)
        if not made.spec.new_tokens:
            return made, self._own_tokenizer
        tokenizer, ids = with_tokens(self._own_tokenizer, made.spec.new_tokens)
        self._refuse_other_ids(made, ids)
        return made, tokenizer

    def _fresh(self, spec: MethodSpec, seed: int, calibration: Sequence[Batch]) -> Attachment:
        directions = self._directions(spec, calibration) if spec.calibrates and calibration else {}
        beside = Beside(self.originals, directions, self._encode)
        if self.kind != "causal" and spec.groups(10**6) is not None:
            raise AdapterError(f"Method {spec.name!r} cuts causal attention, and this base is a {NAMES[self.kind]}.")
        spec = with_head(spec, self.net)
        made = fresh(spec, self.places, torch.Generator().manual_seed(seed), beside)
        refuse_idle_embedding(self.net, [*made.sites, *made.swaps])
        made.overrides = spec.overrides(self.net.config)
        made.fingerprint = self.fingerprint
        if self.folder is not None:
            made.provenance["base_model_name_or_path"] = str(self.folder.resolve())  # where PEFT finds it
        self._refuse_fused(made)
        if spec.trains_base:
            if self.adapters:
                raise AdapterError("Method 'full' trains the base itself: detach the other adapters first.")
            self.net.requires_grad_(True)
        elif spec.new_tokens:
            made.rows |= add_rows(self._take_tokens(spec.new_tokens), self.net, self._base_tensors, self.places)
        return made

    def _directions(self, spec: MethodSpec, calibration: Sequence[Batch]) -> dict[str, Tensor]:
        sites = [s for s in self.places.chosen(spec).values() if isinstance(s, LinearSite)]
        used, self.run.use = self.run.use, {}
        try:
            alone = (
                calibration if self.kind == "causal" else [one for batch in calibration for one in documents_of(batch)]
            )
            return input_directions(self, sites, alone, spec.calibrates)  # of no padding
        finally:
            self.run.use = used

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise SpecError("Starting from a text needs a tokenizer; this model has none.")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _refuse_format(self, spec: MethodSpec) -> None:
        known = type(spec).formats
        weights = (m.frozen for m in self.places.modules.values() if isinstance(m, FrozenLinear))
        found = {w.name for w in weights if isinstance(w, BlockwiseWeight)} or {"dense"}
        if known is not None and (wrong := sorted(found - set(known))):
            why = "trains the base itself" if spec.trains_base else "does not work"
            raise AdapterError(
                f"Method {spec.name!r} {why}: a base in {wrong[0]} is only read. Load it as {' or '.join(known)}."
            )

    def _refuse_fused(self, made: Attachment) -> None:
        attention = {
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "qkv_proj",
            "query_key_value",
            "dense",
            "out_proj",
        }
        only = bool(made.sites) and all(
            isinstance(s, VirtualSite) or s.name.rpartition(".")[2] in attention for s in made.places.values()
        )
        refuse_unsupported(self.net, attention_only=only)

    def _take_tokens(self, tokens: tuple[str, ...], saved: Attachment | None = None) -> list[int]:
        """Teach the tokenizer `tokens`; AdapterError when it gives them other ids than `saved` holds rows for."""
        tokenizer, ids = with_tokens(self.tokenizer, tokens)
        if saved is not None:
            self._refuse_other_ids(saved, ids)
        self.tokenizer = tokenizer
        return ids

    def _refuse_other_ids(self, saved: Attachment, ids: list[int]) -> None:
        for tensor, (rows, _) in saved.rows.items():
            if not set(ids) <= set(rows.tolist()):
                raise AdapterError(
                    f"The tokenizer gives {', '.join(saved.spec.new_tokens)} the ids {ids}, but the adapter's rows of "
                    f"{tensor} are {rows.tolist()}. Attach it alone: another adapter's new tokens are in the way."
                )

    def add_tokens(self, tokens: list[str], name: str | None = None) -> list[int]:
        """Add vocabulary to an attached, trainable adapter: only the new rows train and are saved.

        returns  the ids of `tokens`; ones that the tokenizer knew get their present row as a start
        """
        name = self._one_name(name)
        made = self.adapters[name]
        if not made.trainable or made.rows:
            raise AdapterError(f"Adapter {name!r} is not trainable or has added tokens already.")
        ids = self._take_tokens(tuple(tokens))
        made.rows |= add_rows(ids, self.net, self._base_tensors, self.places)
        made.to(self.device)
        made.spec = made.spec.model_copy(update={"new_tokens": (*made.spec.new_tokens, *tokens)})
        self.installed.install_rows(name, made)
        return ids

    def use(self, which: str | Mapping[str, float] | None) -> None:
        """Compute with one adapter, a weighted set (the base plus the sum of their deltas), or none.

        Copies no weight. Raises NotFound for a name that is not attached, AdapterError for a set that
        cannot be summed.
        """
        if not (which is None or isinstance(which, str | Mapping)):
            raise AdapterError(f"use() takes a name, a set {{name: weight}} or None, not {type(which).__name__}.")
        wanted = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
        for name, weight in wanted.items():
            if not isinstance(weight, int | float) or not math.isfinite(weight):
                raise AdapterError(f"The weight of {name!r} must be a finite number, not {weight!r}.")
        for name in wanted:
            if name not in self.adapters:
                raise NotFound(f"No adapter {name!r} is attached.{near(name, self.adapters)}")
        if wanted and list(wanted.values()) != [1.0]:
            self._refuse_clash(list(wanted))
        self._overrides.apply(self._overrides_of(list(wanted)))
        self.run.use = {name: float(weight) for name, weight in wanted.items()}

    def _overrides_of(self, names: list[str]) -> dict[str, Any]:
        """What the adapters in use want the base's config to say. Raises AdapterError where they differ."""
        wanted = [self.adapters[n].overrides for n in names]
        if wanted and any(w != wanted[0] for w in wanted):
            raise AdapterError(f"{', '.join(map(repr, names))} want other positions of the base: use one at a time.")
        return wanted[0] if wanted else {}

    def _refuse_clash(self, names: list[str]) -> None:
        if in_front := [n for n in names if self.adapters[n].spec.sits in ("input", "cache")]:
            raise AdapterError(
                f"{in_front[0]!r} (method {self.adapters[in_front[0]].spec.name!r}) is virtual tokens in front of the "
                "sequence, which cannot be summed or weighted: it is used alone, with weight 1."
            )
        with_rows = [n for n in names if self.adapters[n].rows]
        if with_rows:
            raise AdapterError(f"{with_rows[0]!r} has vocabulary of its own: it is used alone, with weight 1.")
        for name in names:
            for tensor in self.adapters[name].swaps:
                owner = tensor.rpartition(".")[0]
                if hit := [o for o in names if o != name and owner in self.adapters[o].sites]:
                    raise AdapterError(f"{name!r} replaces {tensor}, where {hit[0]!r} has a change: no sum exists.")

    def detach(self, name: str | None = None) -> None:
        """Take one adapter out, or all; the base is then what it was, bit for bit.

        Raises AdapterError for method 'full', which has changed the base itself.
        """
        if any(a.spec.trains_base for a in self.adapters.values()):
            raise AdapterError("Method 'full' has changed the base itself: load the base again to have it back.")
        for gone in list(self.adapters) if name is None else [self._one_name(name)]:
            del self.adapters[gone]
            self.run.use.pop(gone, None)
            self._overrides.apply(self._overrides_of(list(self.run.use)))
            self.installed.remove(gone)
        if not any(a.rows for a in self.adapters.values()):
            self.tokenizer = self._own_tokenizer

    def _one_name(self, name: str | None) -> str:
        if name is None:
            if len(self.run.use) != 1:
                raise SpecError(f"Say which adapter is meant; in use: {sorted(self.run.use) or 'none'}.")
            return next(iter(self.run.use))
        if name not in self.adapters:
            raise NotFound(f"No adapter {name!r} is attached.{near(name, self.adapters)}")
        return name

    # Parameters and results ------------------------------------------------------------------------

    def trainable(self) -> dict[str, Tensor]:
        """Every tensor that trains, by a unique name: adapters' parameters, or the base's for 'full'."""
        if any(a.spec.trains_base for a in self.adapters.values()):
            return {n: p for n, p in self.net.named_parameters() if p.requires_grad}
        used = {n: a for n, a in self.adapters.items() if a.trainable}
        prefix = len(used) > 1
        return {
            (f"{name}/{key}" if prefix else key): t for name, a in used.items() for key, t in a.parameters().items()
        }

    def adapter(self, name: str | None = None, **provenance: Any) -> Adapter:
        """A finished, immutable copy of an attached adapter (the one in use by default)."""
        return self.adapters[self._one_name(name)].to_adapter({**self._noted(), **provenance})

    def _noted(self) -> dict[str, Any]:
        """What an adapter says of its base's kind."""
        task = self.task
        labels = {"labels": list(task.labels)} if task.labels else {}
        return {} if task.kind == "causal" else {"kind": task.kind, **labels}

    @property
    def task(self) -> Task:
        """What rows become for this base: its kind, and the labels (of the adapter in use, else of the base)."""
        noted = [self.adapters[name].provenance.get("labels") for name in self.run.use]
        return Task(self.kind, tuple(next((n for n in noted if n), labels_of(self.net))))

    # Computing -------------------------------------------------------------------------------------
