"""`Swapped`: a module of the base computing with replaced tensors (trained norms, heads, biases of norms)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from deltaw.model.host import Run


class Swapped(nn.Module):
    """Wraps a module; while an adapter with replacements is in use, its call sees those tensors.

    values  adapter name -> {tensor name inside the module: value}; the base's own tensors stay as they are
    """

    def __init__(self, original: nn.Module, run: Run) -> None:
        super().__init__()
        self.original = original
        self.run = run
        self.values: dict[str, dict[str, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """The base's stored tensor, for code that asks a layer for its weight."""
        return self.original.weight

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
        if not self.is_used():
            return self.original(*args, **kwargs)
        own = dict(self.original.named_parameters()) | dict(self.original.named_buffers())
        seen = {k: t.to(own[k].dtype) for k, t in self.seen().items()}
        return functional_call(self.original, seen, args, kwargs, tie_weights=False)
