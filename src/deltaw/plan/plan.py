"""A plan: bytes by cause at each moment of a run, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor, nn

from deltaw.model.quantised import frozen_weights

CAUSES = (
    "weights",
    "constants",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "workspace",
    "allocator",
    "runtime",
)
"""
weights      of the base: dense tensors, and codes of quantised ones
constants    scales of quantised weights
adapter      the method's parameters (none for `full`: there the weights train)
gradients    of what trains, those that exist at that moment
optimizer    its states
activations  what the forward keeps for the backward
logits       every tensor with the vocabulary's width: logits, their gradient, the loss's pieces
workspace    what exists for a moment, with checkpointing also the block that is computed again
allocator    held by the allocator beyond what is in use
runtime      Python, torch, transformers, the tokenizer
"""


@dataclass(frozen=True)
class Counts:
    """Parameters, and bytes that do not change during a run. All from shapes.

    parameters   of the base;  trainable: of them or of the adapter
    gradients    bytes of all gradients together
    stored       bytes of the tensors of the saved adapter, float32
    """

    parameters: int
    trainable: int
    weights: int
    constants: int
    adapter: int
    gradients: int
    stored: int = 0
    optimizer: int = 0


def count(
    net: nn.Module,
    trainable: dict[str, Tensor],
    held: dict[str, Tensor],
    stored: int,
    times: Callable[[str], int] = lambda _: 1,
) -> Counts:
    """What a base and an adapter take. `net` is the base's own network on the meta device.

    trainable  what trains;  held: every tensor of the adapter;  stored: numbers of the adapter as it is saved
    times      how often a tensor or a module of this name is there (in a short network that stands for a deep one)
    """
    frozen = frozen_weights(net)
    codes = sum(times(n) * w.codes.nbytes for n, w in frozen.items())
    quantised = {t.untyped_storage()._cdata for w in frozen.values() for t in w.buffers()}
    own = {p.untyped_storage()._cdata: (n, p) for n, p in net.named_parameters()}
    dense = own | {b.untyped_storage()._cdata: (n, b) for n, b in net.named_buffers()}
    of_base = all(t.untyped_storage()._cdata in own for t in trainable.values())
    maps = sum(times(n) * w.in_features * w.out_features for n, w in frozen.items())
    return Counts(
        parameters=sum(times(n) * p.numel() for n, p in own.values()) + maps,
        trainable=sum(times(n) * t.numel() for n, t in trainable.items()),
        weights=sum(times(n) * t.nbytes for key, (n, t) in dense.items() if key not in quantised) + codes,
        constants=sum(times(n) * w.nbytes() for n, w in frozen.items()) - codes,
        adapter=0 if of_base else sum(times(n) * t.nbytes for n, t in held.items()),
        stored=4 * stored,
        gradients=sum(times(n) * t.nbytes for n, t in trainable.items()),
    )


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    moments   "load", "loaded", "step", "evaluation": bytes by cause; "load" may hold "file", pages of the checkpoint
              that are dropped after it
    settings  what was planned
    gave_up   what was changed to fit a budget, as sentences
    """

    base: str
    counts: Counts
    moments: dict[str, dict[str, int]]
    settings: dict[str, Any]
    gave_up: tuple[str, ...] = ()
    rules: tuple[dict[str, Any], ...] = field(default=())

    def total(self, moment: str) -> int:
        """Bytes at that moment."""
        return sum(self.moments[moment].values())

    @property
    def peak_moment(self) -> str:
        """The moment at which most memory is in use."""
        return max(self.moments, key=self.total)

    @property
    def peak_bytes(self) -> int:
        """The most resident memory of the whole run."""
        return self.total(self.peak_moment)

    @property
    def step_bytes(self) -> int:
        """The most resident memory after loading."""
        return max(self.total(m) for m in self.moments if m != "load")

    @property
    def needed_bytes(self) -> int:
        """What a budget must hold: the peak, without pages of the checkpoint that the system can drop while loading."""
        load = self.total("load") - self.moments["load"].get("file", 0)
        return max(load, self.step_bytes)

    @property
    def after_load_bytes(self) -> int:
        """Resident memory when the base is loaded, before an adapter is attached."""
        return self.total("loaded")

    @property
    def growth_bytes(self) -> int:
        """How much memory grows after loading."""
        return self.step_bytes - self.after_load_bytes

    def plain(self) -> dict[str, Any]:
        """The plan as --json prints it; bytes are integers, and the causes of `bytes` add up to `peak_bytes`."""
        at = self.moments[self.peak_moment]
        causes = {cause: at.get(cause, 0) for cause in CAUSES} | ({"file": at["file"]} if at.get("file") else {})
        return {
            "base": self.base,
            "parameters": self.counts.parameters,
            "trainable": self.counts.trainable,
            "trainable_percent": 100 * self.counts.trainable / self.counts.parameters,
            "bytes": causes,
            "peak_bytes": self.peak_bytes,
            "peak_moment": self.peak_moment,
            "step_peak_bytes": self.step_bytes,
            "after_load_bytes": self.after_load_bytes,
            "growth_bytes": self.growth_bytes,
            "needed_bytes": self.needed_bytes,
            "moments": self.moments,
            "whole": {k: v for k, v in asdict(self.counts).items() if k not in ("parameters", "trainable")},
            "settings": self.settings,
            "gave_up": list(self.gave_up),
            "rules": list(self.rules),
        }
