"""`Host`: the one layer class that replaces a linear map of the base, with room for adapters.

`EmbeddingHost` is its sibling for input embeddings. Neither changes a weight: taking a host out puts the base's own
module back, and with no adapter in use a host calls that module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.core.site import BlockSite, LinearSite
from deltaw.core.spec import Form, MethodSpec, Params
from deltaw.core.weight import Weight
from deltaw.model.route import Route
from deltaw.ops.affine import apply, apply_columns, change_rows_, delta
from deltaw.ops.bottleneck import bottleneck_delta
from deltaw.ops.rowgain import gained


@dataclass
class Rows:
    """Rows of an embedding or a head that an adapter swaps or adds.

    ids    [n] row numbers; those at or beyond the base's vocabulary are new
    value  [n, dim], float32
    """

    ids: Tensor
    value: Tensor


@dataclass
class Slot:
    """What one adapter holds at one host.

    params  its parameters there and the shared ones; empty where it has rows only, or only listens
    site    the place they belong to: the host's own map, or the half of a block that ends with it
    heard   the block's half for which it keeps the host's input, or None
    form    its normal form there, where that stays; None: made from `params`
    """

    spec: MethodSpec
    params: Params
    site: LinearSite | BlockSite
    rows: Rows | None = None
    heard: str | None = None
    form: Form | None = None


@dataclass
class Run:
    """What the hosts of one model share while it computes.

    use       adapters in use, name -> weight; a set is the base plus the weighted sum of its deltas
    seed      seeds dropout; None outside training
    again     compute blocks again in the backward (activation checkpointing)
    blocks    of the network that this one stands for in a plan; None: as many as it has
    pack      of each document of the pack being computed: (number in its step, tokens, targets), so that dropout does
              not depend on which documents share a pack; None: the whole input has one mask
    forms     normal forms made while nothing trains, by (place, adapter's slot); None: each forward makes them anew
    heard     inputs of the halves of blocks being computed, by the half's name, for a network that stands beside one
    route     which adapter each row wears in a serving step, instead of `use`; None: all rows wear those in use
    """

    use: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    again: bool = False
    blocks: int | None = None
    pack: tuple[tuple[int, int, int], ...] | None = None
    forms: dict[tuple[str, int], Form] | None = None
    heard: dict[str, Tensor] = field(default_factory=dict)
    route: Route | None = None

    @contextmanager
    def keeping_forms(self) -> Iterator[None]:
        """Inside, parameters do not change: what DoRA's or VeRA's forms cost is paid once, not for every token."""
        before, self.forms = self.forms, {} if self.forms is None else self.forms
        try:
            yield
        finally:
            self.forms = before


class Host(nn.Module):
    """One linear map y = W x + b of the base, and the changes that adapters make to it."""

    def __init__(self, site: LinearSite, original: nn.Module, weight: Weight, run: Run, number: int) -> None:
        super().__init__()
        self.site = site
        self.original: Any = original
        self.frozen = weight
        self.run = run
        self.number = number  # distinct per host: part of its dropout's seed
        self.slots: dict[str, Slot] = {}

    @property
    def weight(self) -> Tensor:
        """The base's stored tensor, for code that asks a layer for its weight."""
        weight: Tensor = self.original.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.original, "bias", None)

    def in_use(self) -> list[tuple[Slot, float]]:
        return [(self.slots[n], w) for n, w in self.run.use.items() if n in self.slots]

    def base_is_swapped(self) -> bool:
        """Whether `original` computes with replaced tensors now: the frozen weight is then not the one to change."""
        return hasattr(self.original, "is_used") and bool(self.original.is_used())

    def form(self, slot: Slot) -> Form:
        """The normal form of what one adapter holds here."""
        if slot.form is not None:
            return slot.form
        kept = None if torch.is_grad_enabled() else self.run.forms
        key = (self.site.name, id(slot))
        if kept is not None and key in kept:
            return kept[key]
        form = slot.spec.lower(slot.site, slot.params, self.frozen, self.bias)
        if kept is not None:
            kept[key] = form
        return form

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] (plus the new columns where an adapter adds vocabulary to a head)."""
        if self.run.route is not None:
            return self._routed(x, self.run.route)
        used = self.in_use()
        for slot, _ in used:
            if slot.heard is not None:
                self.run.heard[slot.heard] = x
        changed = [(self.form(slot), w) for slot, w in used if slot.params]
        u = self.run.heard.pop(self.site.name, None)  # before anything that a recomputation may leave early
        if len(changed) == 1 and changed[0][1] == 1.0 and not self.base_is_swapped():
            y = self._changed(changed[0][0], x, u)
        else:
            y = base = self.original(x)
            for form, w in changed:
                y = y + w * self._delta(form, x, base, u)
        for slot, _ in used:
            if slot.rows is not None:
                y = _with_columns(y, slot.rows.ids, self._columns(slot, slot.rows, x))
        return y

    def _routed(self, x: Tensor, route: Route) -> Tensor:
        """`forward` where each row wears its own adapter: one product for all rows, then each segment's change."""
        flat = x.reshape(-1, x.shape[-1])
        here = [(a, b, self.slots[key]) for a, b, key in route.at(len(flat)) if key in self.slots]
        for _, _, slot in here:
            if slot.heard is not None:
                self.run.heard[slot.heard] = flat
        u = self.run.heard.pop(self.site.name, None)
        changed = [(slice(a, b), self.form(slot)) for a, b, slot in here if slot.params]
        y = self.original(_with_in_gains(x, changed)).reshape(len(flat), -1)
        for rows, form in changed:
            if isinstance(form, Affine):
                change_rows_(y[rows], form, flat[rows], self.bias)
            else:
                y[rows] += self._delta(form, flat[rows], y[rows], None if u is None else u[rows])
        for a, b, slot in here:
            if slot.rows is not None:
                new = self._columns(slot, slot.rows, flat[a:b])
                y = _wider(y, slot.rows.ids)
                y[a:b] = y[a:b].index_copy(-1, slot.rows.ids, new)
        out: Tensor = y.reshape(*x.shape[:-1], -1)
        return out

    def _changed(self, form: Form, x: Tensor, u: Tensor | None) -> Tensor:
        """The output with one change; u is the input of the block's half that ends here, where it was kept."""
        if isinstance(form, Affine):
            return apply(form, x, self.frozen, self.bias, self._dropped(form, x))
        y: Tensor = self.original(x)
        return y + self._delta(form, x, y, u)

    def _delta(self, form: Form, x: Tensor, base: Tensor, u: Tensor | None) -> Tensor:
        """What a change adds to the base's output."""
        if isinstance(form, Affine):
            return delta(form, x, self.frozen, base, self.bias, self._dropped(form, x))
        assert isinstance(form, Bottleneck)
        return bottleneck_delta(form, base, u)

    def _columns(self, slot: Slot, rows: Rows, x: Tensor) -> Tensor:
        """Logits of the swapped or added rows: [..., n]. A row that the base has keeps its bias."""
        y = x @ rows.value.to(x.dtype).T
        bias = slot.params.get("bias", self.bias)
        if bias is None:
            return y
        known = rows.ids < bias.shape[0]
        return y + torch.where(known, bias[rows.ids.clamp(max=bias.shape[0] - 1)], 0.0).to(y.dtype)

    def _dropped(self, affine: Affine, x: Tensor) -> Tensor | None:
        """x after dropout; None where there is none."""
        return x * self._keep(x, affine.drop) if affine.drop > 0 and self.run.seed is not None else None

    def _keep(self, x: Tensor, drop: float) -> Tensor:
        """The dropout mask: a function of seed, place and document, so that recomputation, resume and splits agree."""
        seed = (self.run.seed or 0) * 1_000_003 + self.number
        for column in (1, 2):  # all tokens of the pack; or its targets alone, at the head
            rows = [(document[0], document[column]) for document in self.run.pack or ()]
            if rows and x.numel() == sum(n for _, n in rows) * x.shape[-1]:
                drawn = torch.cat([_uniform(n, x.shape[-1], seed + (number + 1) * _STRIDE) for number, n in rows])
                break
        else:
            drawn = _uniform(x.numel() // x.shape[-1], x.shape[-1], seed)
        return (drawn >= drop).view(x.shape).to(x.dtype).div_(1 - drop).to(x.device)


_STRIDE = 2**45  # between the seeds of a step's documents; a generator folds what goes beyond 64 bits


def _uniform(rows: int, columns: int, seed: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float32)


class EmbeddingHost(Host):
    """An input embedding: the same linear map, applied to one-hot vectors by looking columns up."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., dim]."""
        route = self.run.route
        if route is None:
            return self._worn(ids, self.original(self._known(ids, self.in_use())), self.in_use())
        here = [(a, b, [(self.slots[key], 1.0)]) for a, b, key in route.rows if key in self.slots]
        y: Tensor = self.original(self._known(ids, [used[0] for _, _, used in here]))
        for a, b, used in here:
            y[:, a:b] = self._worn(ids[:, a:b], y[:, a:b], used)
        return y

    def _known(self, ids: Tensor, used: Sequence[tuple[Slot, float]]) -> Tensor:
        """ids with any id of the base's in place of new tokens' ids."""
        return ids.clamp(max=self.frozen.in_features - 1) if any(s.rows is not None for s, _ in used) else ids

    def _worn(self, ids: Tensor, y: Tensor, used: Sequence[tuple[Slot, float]]) -> Tensor:
        """The base's embeddings y of ids, with the changes `used`."""
        n_vocab = self.frozen.in_features
        known = self._known(ids, used)
        gain = getattr(self.original, "embed_scale", None)  # Gemma 3 scales inside its embedding
        base = None
        for slot, w in used:
            if slot.params:
                base = self.frozen.columns(known) if base is None else base
                form = self.form(slot)
                assert isinstance(form, Affine)
                d = apply_columns(form, known, self.frozen) - base
                y = y + w * (d if gain is None else d * gain.to(y.dtype))
        for slot, _ in used:
            if slot.rows is not None:
                y = _looked_up(y, ids, slot.rows, n_vocab, gain)
        return y


def _looked_up(y: Tensor, ids: Tensor, rows: Rows, n_vocab: int, gain: Tensor | None) -> Tensor:
    """y with the rows of swapped or new tokens in place."""
    size = max(n_vocab, int(rows.ids.max()) + 1)
    number = torch.full((size,), -1, dtype=torch.long, device=ids.device)
    number[rows.ids] = torch.arange(len(rows.ids), device=ids.device)
    which = number[ids]
    value = nn.functional.embedding(which.clamp(min=0), rows.value).to(y.dtype)
    if gain is not None:
        value = value * gain.to(y.dtype)
    return torch.where((which >= 0).unsqueeze(-1), value, y)


def _with_columns(y: Tensor, ids: Tensor, new: Tensor) -> Tensor:
    """Logits y [..., V] with the columns `ids` replaced or appended by `new` [..., n]."""
    return _wider(y, ids).index_copy(-1, ids, new)


def _wider(y: Tensor, ids: Tensor) -> Tensor:
    """Logits y [..., V] with impossible new columns, so that all of `ids` are among them."""
    extra = int(ids.max()) + 1 - y.shape[-1]
    return y if extra <= 0 else torch.cat([y, y.new_full((*y.shape[:-1], extra), float("-inf"))], -1)


def _with_in_gains(x: Tensor, changed: Sequence[tuple[slice, Form]]) -> Tensor:
    """x with each segment's gain on inputs; a copy where there is one."""
    gains = [(rows, f.in_gain) for rows, f in changed if isinstance(f, Affine) and f.in_gain is not None]
    if not gains:
        return x
    x = x.clone()
    flat = x.view(-1, x.shape[-1])
    for rows, gain in gains:
        flat[rows] = gained(flat[rows], gain)
    return x
