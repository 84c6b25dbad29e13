"""The product of a gated feed-forward block: h = act(gate) up, and its backward in place.

Source: GLU Variants Improve Transformer (arXiv:2002.05202). Not autograd operations: fused blocks call them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.errors import BadInput
from deltaw.ops.native import elementwise_calls as calls


def gated(gate: Tensor, up: Tensor, act: str, out: Tensor | None = None) -> Tensor:
    """h = act(gate) up in gate's dtype, computed in float32 and rounded once.

    gate, up   [n, f], each row contiguous: the halves of one [n, 2 f] buffer will do
    act        "silu", "gelu_tanh" or "gelu"
    out        where h is written, laid out as gate may be; None: a new contiguous tensor

    Raises BadInput for another act, ShapeError for other shapes or strides.
    """
    _check(act)
    if not calls.suits(gate, up, out):
        h = gated_reference(gate, up, act)
        return h if out is None else out.copy_(h)
    h = gate.new_empty(gate.shape) if out is None else out
    if not gate.is_meta:
        calls.gated(gate, up, act, h)
    return h


def gated_backward_(dh: Tensor, gate: Tensor, up: Tensor, act: str, h: Tensor | None = None) -> Tensor:
    """Write the gradients of gate and up over them, and give h = act(gate) up once more, bit for bit `gated`'s.

        dgate = dh up act'(gate)        dup = dh act(gate)

    dh       [n, f], each row contiguous
    h        where h is written, laid out as gate may be; dh itself will do. None: a new contiguous tensor

    Raises BadInput for another act, ShapeError for other shapes or strides.
    """
    _check(act)
    if not calls.suits(gate, up, dh, h):
        made, dgate, dup = gated_backward_reference(dh, gate, up, act)
        gate.copy_(dgate)
        up.copy_(dup)
        return made if h is None else h.copy_(made)
    h = gate.new_empty(gate.shape) if h is None else h
    if not gate.is_meta:
        calls.gated_backward(dh, gate, up, act, h)
    return h


def gated_reference(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """The slow, plain form of `gated`."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (_value(gate.to(wide), act) * up.to(wide)).to(gate.dtype)


def gated_backward_reference(dh: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """The slow, plain form of `gated_backward_`: h, dgate and dup, each new."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    x, u, g = gate.to(wide), up.to(wide), dh.to(wide)
    value = _value(x, act)
    made = value * u, g * u * _slope(x, act), g * value
    h, dgate, dup = (t.to(gate.dtype) for t in made)
    return h, dgate, dup


def _value(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _slope(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))
    if act == "gelu":
        return 0.5 * torch.erfc(-x / math.sqrt(2)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * c * (1 + 3 * 0.044715 * x * x)


def _check(act: str) -> None:
    if act not in calls.ACTS:
        raise BadInput(f"there is no activation {act!r} here.\n  Known: {', '.join(calls.ACTS)}.")
