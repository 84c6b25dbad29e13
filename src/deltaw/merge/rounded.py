"""A checkpoint as a quantised base computes with it: its linear maps' weights dequantised, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from deltaw.errors import BaseError
from deltaw.formats import QUANTISED
from deltaw.merge.checkpoint import FLOATS, Checkpoint, Entry
from deltaw.model.empty import empty_network
from deltaw.model.quantised import Format, quantisable


class RoundedCheckpoint(Checkpoint):
    """Like the folder's own, but each weight of a linear map is what its 4 or 8 bits stand for.

    how    the format to round dense weights to; of a folder that is quantised already, its own
    dtype  ("float32") that a dequantised weight is said to have; `read` gives it in float32
    labels of a text classifier; None: as the folder's head has them

    Weights have the network's orientation; the parts in which a quantised one is stored are hidden.
    """

    def __init__(self, folder: Path, how: Format, dtype: str, labels: Sequence[str] | None = None) -> None:
        super().__init__(folder)
        self.how = how
        self._parts: dict[str, dict[str, str]] = {}  # key -> {part as in BlockwiseWeight.entries: stored key}
        self._transposed: dict[str, bool] = {}  # keys of rounded weights
        net = empty_network(folder, labels)
        name_of = {torch_dtype: name for name, torch_dtype in FLOATS.items()}
        for name, site in quantisable(net).items():
            shape = tuple(net.get_submodule(name).weight.shape)
            dense = self.key_of(f"{name}.weight", shape, net.base_model_prefix)
            if dense is None:
                dense = self._hide_parts(f"{name}.weight", net.base_model_prefix)
                if dense is None:
                    continue  # the files name it otherwise: the merge loads the network
                file = self.where[dense]
                stored = getattr(torch, dtype)
                self.entries[dense] = Entry(file, name_of[stored], shape, stored.itemsize * torch.Size(shape).numel())
            self._transposed[dense] = site.kind == "conv1d"

    def _hide_parts(self, tensor: str, prefix: str) -> str | None:
        """Take the parts of a quantised weight out of `entries`; returns the key it is to have, if it is there."""
        for key in (tensor, tensor.removeprefix(f"{prefix}."), f"{prefix}.{tensor}"):
            parts = [k for k in self.entries if k == key or k.startswith(f"{key}.")]
            if len(parts) > 1:
                self._parts[key] = {"weight" + k.removeprefix(key): k for k in parts}
                for part in parts:
                    del self.entries[part]
                return key
        return None

    def read(self, key: str) -> Tensor:
        """One tensor: as it is stored, or as its quantised form stands for."""
        if key not in self._transposed:
            return super().read(key)
        try:
            if key in self._parts:
                entries = {part: self.stored(k) for part, k in self._parts[key].items()}
                rounded = QUANTISED[self.how.name].from_entries(entries).dense()
            else:
                dense = self.stored(key).float()
                rounded = self.how.make(dense.T if self._transposed[key] else dense, torch.float32).dense()
        except BaseError as problem:
            raise BaseError(f"{key}: {problem}") from problem
        return rounded.T.contiguous() if self._transposed[key] else rounded
