"""What computes a step: the protocol, and the runner that works for every architecture whose documents can share a row.

The generic runner is transformers' own forward, with our attention over pages (model/paged.py) and hosts that apply to
each segment's rows its own adapter (model/host.py, `Run.route`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from deltaw.model.model import Model
from deltaw.model.paged import paged_logits
from deltaw.model.resident import Resident
from deltaw.model.route import Route
from deltaw.serve.batch import StepBatch
from deltaw.serve.pages import PAGE_TOKENS, Pages


class Runner(Protocol):
    """Computes steps. Everything but `ready` is called in the engine's thread, adapters between steps."""

    def ready(self, resident: Resident) -> object:
        """What `add` needs of an adapter beside it; made in any thread, so that no step waits for it."""

    def add(self, key: str, resident: Resident, ready: object) -> None:
        """Make an adapter usable under `key`, which segments name. ready: what `ready` gave for it."""

    def remove(self, key: str) -> None:
        """Forget it; no step will name it again."""

    def run(self, batch: StepBatch) -> Tensor:
        """Write keys and values of all rows into the pages; logits of the wanted rows [n, vocab], float32 or base's."""


class GenericRunner:
    """The model's own forward over pages."""

    def __init__(self, model: Model, pages: Pages) -> None:
        self._model = model
        self._pages = pages
        self._residents: dict[str, Resident] = {}

    def ready(self, resident: Resident) -> object:
        """Nothing."""
        return None

    def add(self, key: str, resident: Resident, ready: object = None) -> None:
        """Make an adapter usable under `key`, which segments name."""
        self._residents[key] = resident
        resident.put_in(self._model, key)

    def remove(self, key: str) -> None:
        """Forget it; the base's own modules are back with the last one."""
        self._residents.pop(key).take_out(self._model, key)

    def run(self, batch: StepBatch) -> Tensor:
        """Write keys and values of all rows into the pages; logits of the wanted rows [n, vocab], in base's dtype."""
        self._model.run.route = Route(batch.segments, batch.head)
        try:
            return paged_logits(
                self._model.net, _Attention(batch, self._pages), batch.ids, batch.positions, batch.wanted,
                self.vectors(batch),
            )  # fmt: skip
        finally:
            self._model.run.route = None
            self._model.run.heard.clear()

    def vectors(self, batch: StepBatch) -> Tensor | None:
        """The vectors that stand for negative ids, in order; None where there are none."""
        if not bool((batch.ids < 0).any()):
            return None
        parts = []
        for start, stop, key in batch.segments:
            own = batch.ids[start:stop]
            numbers = -1 - own[own < 0]
            if key is not None and len(numbers):
                front = self._residents[key].front
                assert front is not None
                assert front.inputs is not None
                parts.append(front.inputs[0, numbers])
        return torch.cat(parts)


class _Attention:
    """Attention of one step's rows over the pages, by PyTorch's operations.

    Sequences with one row each and tables of like length are computed together, a prompt's chunk alone.
    """

    def __init__(self, batch: StepBatch, pages: Pages) -> None:
        self._batch = batch
        self._pages = pages
        bounds, contexts = batch.bounds.tolist(), batch.contexts.tolist()
        groups: dict[tuple[int, int], list[int]] = {}
        for s, context in enumerate(contexts):
            n = bounds[s + 1] - bounds[s]
            used = -(-(context + n) // PAGE_TOKENS)
            groups.setdefault((1, used.bit_length()) if n == 1 else (0, s), []).append(s)
        self._groups = [self._group(which, bounds, contexts) for which in groups.values()]
        self._hidden: dict[tuple[int, int | None], Tensor] = {}

    def _group(self, which: list[int], bounds: list[int], contexts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(rows [n, L], pages [n, P], positions [n, L]) of sequences that have L rows each."""
        device = self._batch.ids.device
        length = bounds[which[0] + 1] - bounds[which[0]]
        width = max(-(-(contexts[s] + length) // PAGE_TOKENS) for s in which)
        index = torch.tensor(which, dtype=torch.long, device=device)
        rows = self._batch.bounds[index, None] + torch.arange(length, device=device)
        return rows, self._batch.tables[index, :width].long(), self._batch.positions[rows]

    def _unseen(self, number: int, window: int | None) -> Tensor:
        """[n, L, P * PAGE_TOKENS]: which positions each row does not see."""
        if (number, window) not in self._hidden:
            _, tables, positions = self._groups[number]
            place = torch.arange(tables.shape[1] * PAGE_TOKENS, device=tables.device)
            hidden = place > positions[..., None]
            if window is not None:
                hidden |= place <= positions[..., None] - window
            self._hidden[number, window] = hidden
        return self._hidden[number, window]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """q [T, heads, D], k and v [T, kv_heads, D] -> [T, heads, D of v]."""
        self._pages.write(layer, self._batch.slots, k, v)
        keys, values = self._pages.keys[layer], self._pages.values[layer]
        heads, shared = q.shape[1], k.shape[1]
        out = q.new_empty(*q.shape[:2], v.shape[2])
        for number, (rows, tables, positions) in enumerate(self._groups):
            n, length = rows.shape
            unseen = self._unseen(number, window)
            old_k = keys[tables].flatten(1, 2).transpose(1, 2)  # [n, kv_heads, places, D]
            old_v = values[tables].flatten(1, 2)
            beyond = torch.arange(old_v.shape[1], device=q.device) > positions[:, -1:]
            # what lies behind a sequence is another's: a NaN there must not be multiplied by zero
            old_v = old_v.masked_fill(beyond[..., None, None], 0.0).transpose(1, 2)
            of_rows = q[rows].view(n, length, shared, heads // shared, -1).permute(0, 2, 3, 1, 4)
            scores = of_rows.flatten(2, 3) * scale @ old_k.transpose(2, 3)
            if softcap is not None:
                scores = torch.tanh(scores / softcap) * softcap
            scores = scores.view(n, shared, heads // shared, length, -1)
            scores = scores.float().masked_fill_(unseen[:, None, None], float("-inf"))
            weights = scores.softmax(-1).to(q.dtype).flatten(2, 3)
            y = (weights @ old_v).view(n, shared, heads // shared, length, -1)
            out[rows] = y.permute(0, 3, 1, 2, 4).flatten(2, 3)
        return out
