"""What planners have made and go on with: models without memory, and the bytes of traces."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor, nn

from deltaw.core.weight import Weight
from deltaw.model.model import Model
from deltaw.plan.plan import Counts
from deltaw.plan.short import Short

_T = TypeVar("_T")
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Planned:
    """A model on the meta device, and what it takes; `short`: how it stands for a deeper one, None: it does not."""

    model: Model
    counts: Counts
    short: Short | None = None

    @property
    def trains_base(self) -> bool:
        """Whether the network is no longer the base."""
        return any(made.spec.trains_base for made in self.model.adapters.values())

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """The tensors that are there before a step, by name."""
        net = self.model.net
        return {**dict(net.named_parameters()), **dict(net.named_buffers()), **self.model.trainable()}

    @property
    def _maps(self) -> list[Weight]:
        """The base's linear maps, which have a format; an adapter may wear them."""
        places = self.model.places
        return [places.weights[n] for n, s in places.sites.items() if s.kind != "embedding" and not s.is_head]

    @cached_property
    def of_maps(self) -> list[Tensor]:
        """What they hold."""
        return [t for w in self._maps if isinstance(w, nn.Module) for t in w.buffers()]

    @cached_property
    def of_any_format(self) -> bool:
        """Whether a step takes what it takes on the dense base, if there it never looked into `of_maps`.

        Blocks are fused, and products are compiled for the same reasons in each format that they can read.
        """
        if any(made.spec.trains_base or made.spec.save_modules for made in self.model.adapters.values()):
            return False
        dtype = self.model.net.dtype
        return all(w.native(dtype) is not None for w in self._maps) and self.model.why_plain() is None


class Kept:
    """What planners have made, for one thread at a time: a few models without memory, and the bytes of many traces."""

    def __init__(self, models: int = 12, traces: int = 1024) -> None:
        self.models: OrderedDict[Key, Planned] = OrderedDict()
        self.traces: OrderedDict[Key, dict[str, int]] = OrderedDict()
        self.optimizers: OrderedDict[Key, int] = OrderedDict()
        self._most = {id(self.models): models, id(self.traces): traces, id(self.optimizers): traces}

    def keep(self, where: OrderedDict[Key, _T], key: Key, value: _T) -> _T:
        """`value`, from now on under `key` in one of the three; the oldest goes where there are too many."""
        where[key] = value
        where.move_to_end(key)
        if len(where) > self._most[id(where)]:
            where.popitem(last=False)
        return value
