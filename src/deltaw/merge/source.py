"""A base as something to merge into: its tensors by the network's names, without loading the network.

Tensors are read from the folder's files where each one that the adapter touches is found there. Where the
files use other names (transformers renames some on load), the network is loaded whole instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.merge.checkpoint import Checkpoint, StoredWeight
from deltaw.model.attachment import Attachment
from deltaw.model.empty import empty_network
from deltaw.model.kinds import kind_of
from deltaw.model.load import load_transformers
from deltaw.model.places import Places
from deltaw.model.quantised import Format, dequantise_network
from deltaw.model.sites import find_sites
from deltaw.model.strict import strict


class Source:
    """The base of a merge.

    net      the network: empty, or loaded whole when `loaded`
    kind     what it computes: "causal", "seq2seq" or "classify"
    keys     the network's tensor names -> names in the files; a tied tensor has that of its partner
    own      those of `keys` that have a tensor of their own in the files
    missing  what the adapters touch and the files do not name: the reason to load the network

    adapters   what is to be merged, of one set of labels; none: every tensor is touched
    contradicts_tie: config.json ties two tensors that the files hold with different values.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        adapters: Adapter | Sequence[Adapter],
        dtype: str,
        how: Format | None = None,
    ) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        adapters = [adapters] if isinstance(adapters, Adapter) else adapters
        labels = adapters[0].provenance.get("labels") or None if adapters else None
        self.net = empty_network(folder, labels)
        self.kind = kind_of(self.net)
        self.sites = find_sites(self.net)
        self.tensors = dict(self.net.named_parameters(remove_duplicate=False))
        self.contradicts_tie = False
        self.ties = self._ties()
        self.keys, self.own = self._keys()
        needed = [f"{s}.{part}" for a in adapters for s in a.sites for part in ("weight", "bias")]
        needed += [r.tensor for a in adapters for r in a.replaced]
        needed = needed if adapters else list(self.tensors)
        self.missing = [n for n in needed if n in self.tensors and n not in self.keys]
        self.loaded = bool(self.missing)
        if self.loaded:
            self.net = dequantise_network(load_transformers(folder, dtype, how, labels))
            self.tensors = dict(self.net.named_parameters(remove_duplicate=False))
            self.ties = self._ties()

    def read(self, name: str) -> Tensor:
        """A tensor by the network's name, as it is stored."""
        return self.tensors[name].detach() if self.loaded else self.checkpoint.read(self.keys[name])

    def match(self, adapter: Adapter) -> tuple[Attachment, Places]:
        """The adapter fitted to this base, strictly. Raises AdapterError that lists what does not fit."""
        modules = dict(self.net.named_modules())
        weights = _Lazy(list(self.sites), self._weight)
        biases = _Lazy([n for n, s in self.sites.items() if s.has_bias], lambda n: self.read(f"{n}.bias"))
        places = Places.of(self.net, self.sites, weights, biases, modules)
        replaced = {r.tensor for r in adapter.replaced if r.rows is None and r.tensor in self.tensors}
        base = {n: self.read(n) if n in replaced else t for n, t in self.tensors.items()}
        return strict(adapter, places, base), places

    def _weight(self, name: str) -> StoredWeight:
        tensor = f"{name}.weight"
        shape = tuple(self.tensors[tensor].shape)
        return StoredWeight(shape, self.sites[name].kind != "linear", lambda: self.read(tensor))

    def _ties(self) -> dict[str, tuple[str, ...]]:
        groups: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            groups.setdefault(id(tensor), []).append(name)
        return {n: tuple(o for o in names if o != n) for names in groups.values() if len(names) > 1 for n in names}

    def _keys(self) -> tuple[dict[str, str], set[str]]:
        prefix = self.net.base_model_prefix
        keys: dict[str, str] = {}
        for name, tensor in self.tensors.items():
            key = self.checkpoint.key_of(name, tuple(tensor.shape), prefix)
            if key is not None:
                keys[name] = key
        own = set(keys)
        for name, partners in list(self.ties.items()):
            with_key = next((p for p in partners if p in own), None)
            if name not in own and with_key is not None:
                keys[name] = keys[with_key]
            elif name in own and with_key is not None and not self._equal(keys[name], keys[with_key]):
                self.contradicts_tie = True
                self.ties.pop(name)  # the files hold two different tensors: transformers does not tie them
        return keys, own

    def _equal(self, one: str, other: str) -> bool:
        return one == other or torch.equal(self.checkpoint.read(one), self.checkpoint.read(other))


class _Lazy(Mapping[str, Any]):
    """A mapping whose values are made when they are asked for."""

    def __init__(self, names: list[str], make: Callable[[str], Any]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
