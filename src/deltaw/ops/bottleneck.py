"""Apply a Bottleneck (core/bottleneck.py has the formula) behind or beside one half of a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.core.bottleneck import Bottleneck
from deltaw.errors import WorkFailed

ACTS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


def bottleneck_delta(form: Bottleneck, h: Tensor, u: Tensor | None = None) -> Tensor:
    """What the small network adds, [..., d] in h's dtype.

    h  [..., d]  the half's output;  u  [..., d]  its input, which a parallel network reads

    Raises WorkFailed when a parallel network is not given u: the half's first map was not called.
    """
    x = u if form.parallel else h
    if x is None:
        raise WorkFailed("A parallel adapter has not seen the input of its block's half: is its first map called?")
    dtype = x.dtype
    inner = ACTS[form.act](F.linear(x, form.down.to(dtype), form.down_bias.to(dtype)))
    d = F.linear(inner, form.up.to(dtype), form.up_bias.to(dtype))
    return d if form.scale == 1.0 else form.scale * d
