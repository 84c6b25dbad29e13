"""The Bottleneck normal form: a small network beside or behind one half of a block.

    y = h + scale * (up act(down u + down_bias) + up_bias)

    h         [..., d]       output of the half, before the residual sum
    u         [..., d]       h itself (serial), or the half's input (parallel)
    down      [m, d]         up [d, m];  down_bias [m], up_bias [d]
    act       one of ACTIVATIONS

It is not linear in its input, so no plain weight can hold it. ops/bottleneck.py computes it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deltaw.core.site import BlockSite
from deltaw.errors import ShapeError

ACTIVATIONS = ("relu", "gelu", "silu", "tanh")


@dataclass(frozen=True)
class Bottleneck:
    """A change at one half of a block."""

    down: Tensor
    up: Tensor
    down_bias: Tensor
    up_bias: Tensor
    act: str = "relu"
    scale: float = 1.0
    parallel: bool = False


def check_bottleneck(form: Bottleneck, site: BlockSite) -> None:
    """Raise ShapeError unless every part of `form` fits `site`."""
    m, d = form.down.shape[0], site.width
    wanted = {"down": (m, d), "up": (d, m), "down_bias": (m,), "up_bias": (d,)}
    for part, shape in wanted.items():
        found = tuple(getattr(form, part).shape)
        if found != shape:
            raise ShapeError(f"{site.name}: {part} has shape {found}, this place needs {shape}.")
