"""AdamW on parts of parameters, with states in 32 or 8 bits.

p -= lr wd p;   m += (1 - b1) (g - m);   v = b2 v + (1 - b2) g^2
p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deltaw.errors import RecipeError
from deltaw.train.optim.dynamic import BLOCK, Scratch, dynamic_map
from deltaw.train.optim.pages import Kind, Shape
from deltaw.train.optim.store import States

CHUNK = 32768
"""Values in 8 bits that are updated at a time: their scratch fits a core's cache."""

FROM = 4096
"""Parameters with fewer elements keep states of 32 bits, as in bitsandbytes."""


class Piece(NamedTuple):
    """A part of a parameter, flat; all of it changes in place but the gradient and `step`.

    step   [] float32, on the parameter's device: updates of the parameter, this one counted
    whole  the sizes of the whole parameter
    """

    value: Tensor
    grad: Tensor
    step: Tensor
    states: States
    whole: tuple[int, ...]


class Rule(Protocol):
    """How an optimizer changes a part of a parameter, element by element, or all of it at once."""

    def kinds(self, of: Shape) -> tuple[Kind, ...]:
        """The states it keeps for a parameter; they begin as zeros."""

    def takes_whole(self, of: Shape) -> bool:
        """Whether an update needs all of a parameter's elements at once."""

    def scratch_bytes(self, n: int) -> int:
        """What an update of pages of n elements holds beside them, in each thread."""

    def update(self, pieces: Sequence[Piece], group: dict[str, Any]) -> None:
        """Change the pieces, with a parameter group's settings."""


class AdamW32:
    """AdamW with states in the parameter's own dtype; torch.optim.AdamW(fused=True) bit for bit.

    The fused kernel works on vectors and on a rest at the tensor's end. Pages begin at multiples of 256 elements, so
    every element is in the same place of a vector, or of the rest, as in the whole tensor.
    """

    def kinds(self, of: Shape) -> tuple[Kind, ...]:
        return Kind("exp_avg", of.dtype, of.n), Kind("exp_avg_sq", of.dtype, of.n)

    def takes_whole(self, of: Shape) -> bool:
        return False

    def scratch_bytes(self, n: int) -> int:
        return 0

    def update(self, pieces: Sequence[Piece], group: dict[str, Any]) -> None:
        m, v = [p.states["exp_avg"] for p in pieces], [p.states["exp_avg_sq"] for p in pieces]
        _fused([p.value for p in pieces], [p.grad for p in pieces], m, v, [p.step for p in pieces], group)


class AdamW8:
    """AdamW with states in 8 bits, by block: 2.03 bytes a parameter instead of 8.

    m keeps the signed dynamic map, v the unsigned one, each with one absmax for 256 values. They are brought to
    float32, updated as `AdamW32` does, and brought back. Source: arXiv:2110.02861; bitsandbytes' AdamW8bit.
    """

    def __init__(self) -> None:
        self._m, self._v = dynamic_map(signed=True), dynamic_map(signed=False)
        self._plain = AdamW32()
        self._local = threading.local()

    def kinds(self, of: Shape) -> tuple[Kind, ...]:
        n = of.n
        if n < FROM:
            return self._plain.kinds(of)
        if of.dtype != torch.float32 or of.device != "cpu":
            raise RecipeError(
                f"train.optimizer.bits is 8, and {of.name} is {str(of.dtype).removeprefix('torch.')} on "
                f"{of.device}: states of 8 bits are for float32 parameters on the CPU. Use bits=32."
            )
        return tuple(
            kind
            for state in ("exp_avg", "exp_avg_sq")
            for kind in (
                Kind(f"{state}_codes", torch.uint8, n),
                Kind(f"{state}_absmax", torch.float32, -(-n // BLOCK), BLOCK),
            )
        )

    def takes_whole(self, of: Shape) -> bool:
        return False

    def scratch_bytes(self, n: int) -> int:
        return min(n, CHUNK) * (Scratch.bytes_per_value + 8)

    def update(self, pieces: Sequence[Piece], group: dict[str, Any]) -> None:
        if plain := [p for p in pieces if "exp_avg" in p.states]:
            self._plain.update(plain, group)
        for piece in pieces:
            if "exp_avg" not in piece.states:
                for start in range(0, piece.value.numel(), CHUNK):
                    self._update(piece, slice(start, min(start + CHUNK, piece.value.numel())), group)

    def _update(self, piece: Piece, part: slice, group: dict[str, Any]) -> None:
        scratch, m, v = self._scratch(part.stop - part.start)
        blocks = slice(part.start // BLOCK, -(-part.stop // BLOCK))
        of_m = piece.states["exp_avg_codes"][part], piece.states["exp_avg_absmax"][blocks]
        of_v = piece.states["exp_avg_sq_codes"][part], piece.states["exp_avg_sq_absmax"][blocks]
        self._m.dequantise(*of_m, m, scratch)
        self._v.dequantise(*of_v, v, scratch)
        _fused([piece.value[part]], [piece.grad[part]], [m], [v], [piece.step], group)
        self._m.quantise(m, *of_m, scratch)
        self._v.quantise(v, *of_v, scratch)

    def _scratch(self, n: int) -> tuple[Scratch, Tensor, Tensor]:
        """This thread's buffers, of which m and v are `n` long."""
        found = getattr(self._local, "buffers", None)
        if found is None or found[1].numel() < n:
            found = self._local.buffers = (
                Scratch(n),
                torch.empty(n, dtype=torch.float32),
                torch.empty(n, dtype=torch.float32),
            )
        return found[0], found[1][:n], found[2][:n]


def _fused(
    values: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    steps: list[Tensor],
    group: dict[str, Any],
) -> None:
    torch._fused_adamw_(
        values,
        grads,
        m,
        v,
        [],
        steps,
        amsgrad=False,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
