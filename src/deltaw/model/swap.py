"""`Swapped`: a module of the base computing with replaced tensors (trained norms, heads, biases of norms)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deltaw.model.host import Run
from deltaw.model.route import Route


class Swapped(nn.Module):
    """Wraps a module; while an adapter with replacements is in use, its call sees those tensors.

    values  adapter name -> {tensor name inside the module: value}; the base's own tensors stay as they are
    """

    def __init__(self, original: nn.Module, run: Run) -> None:
        super().__init__()
        self.original: Any = original
        self.run = run
        self.values: dict[str, dict[str, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """The base's stored tensor, for code that asks a layer for its weight."""
        weight: Tensor = self.original.weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.original, "bias", None)

    def is_used(self) -> bool:
        """Whether an adapter in use replaces a tensor here."""
        return any(name in self.values for name in self.run.use)

    def seen(self) -> dict[str, Tensor]:
        """The replaced tensors by name as adapters in use make them: in their own dtype where one replaces whole."""
        used = [(self.values[n], w) for n, w in self.run.use.items() if n in self.values]
        own = dict(self.original.named_parameters()) | dict(self.original.named_buffers())
        if len(used) == 1 and used[0][1] == 1.0:
            return dict(used[0][0])
        keys = {k for values, _ in used for k in values}
        return {k: own[k] + sum(w * (v[k].to(own[k].dtype) - own[k]) for v, w in used if k in v) for k in keys}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.run.route is not None:
            return self._routed(args, kwargs, self.run.route)
        return self._computed(self.seen(), args, kwargs) if self.is_used() else self.original(*args, **kwargs)

    def _computed(self, seen: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        own = dict(self.original.named_parameters()) | dict(self.original.named_buffers())
        cast = {k: t.to(own[k].dtype) for k, t in seen.items()}
        return functional_call(self.original, cast, args, kwargs, tie_weights=False)

    def _routed(self, args: Any, kwargs: Any, route: Route) -> Any:
        """Segment by segment: every tensor given is [1, rows, ...] or [rows, ...], and so is the result."""
        if len(route.rows) == 1:
            own = self.values.get(route.rows[0][2] or "")
            return self._computed(own, args, kwargs) if own else self.original(*args, **kwargs)
        shape = next(t.shape for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        dim = 1 if shape[0] == 1 else 0  # two segments are more than one row
        segments = route.at(shape[dim])
        if not any(key in self.values for _, _, key in segments):
            return self.original(*args, **kwargs)
        parts = []
        for a, b, key in segments:
            given = tuple(t.narrow(dim, a, b - a) if isinstance(t, Tensor) else t for t in args)
            named = {k: t.narrow(dim, a, b - a) if isinstance(t, Tensor) else t for k, t in kwargs.items()}
            seen = self.values.get(key or "")
            parts.append(self._computed(seen, given, named) if seen else self.original(*given, **named))
        return torch.cat(parts, dim)
