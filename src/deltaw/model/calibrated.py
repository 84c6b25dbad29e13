"""A quantised network whose codes are chosen by what goes into each map: GPTQ in one pass over some text.

All the text goes through the network at once. When it reaches a map, the map's codes are chosen for what arrives, and
the pass goes on with them: each map is fitted to the inputs that it will have, those of the quantised maps before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.data.template import Example
from deltaw.errors import BaseError, DataError
from deltaw.formats import QUANTISED
from deltaw.formats.calibrate import calibrated, inverse_factor, second_moment
from deltaw.model.frozen import FrozenLinear
from deltaw.model.kinds import NAMES, kind_of
from deltaw.model.quantised import Format

WINDOW = 512
"""Tokens of a document that calibration reads, at most."""


def windows(net: PreTrainedModel, examples: Sequence[Example], most_tokens: int) -> Tensor:
    """Documents end to end, cut into equal windows: [n, length] int64, of at most `most_tokens` in all.

    Raises DataError where that is fewer than the widest map has inputs: their second moments would be singular.
    """
    limit = getattr(net.config.get_text_config(), "max_position_embeddings", None) or WINDOW
    length = min(WINDOW, limit)
    ids = list(chain.from_iterable(e.input_ids for e in examples))[:most_tokens]
    n = len(ids) // length
    widest = max(m.in_features for m in net.modules() if isinstance(m, FrozenLinear))
    if n * length < widest:
        raise DataError(
            f"calibration has {n * length:,} tokens (windows of {length}), and the widest map has {widest:,} inputs.\n"
            f"  Give at least {widest:,} tokens of text, better ten times as many."
        )
    return torch.tensor(ids[: n * length], dtype=torch.long).view(n, length)


@torch.no_grad()
def calibrate(
    net: PreTrainedModel,
    how: Format,
    dense: Callable[[str], Tensor],
    ids: Tensor,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """Choose the codes of a quantised network again, in place; returns the maps that the text did not reach.

    dense  a map's W [out, in] by its name, as the checkpoint has it
    ids    tokens [n, length], as `windows` gives them

    One map is dense at a time. Beside it the pass holds what a block computes for all tokens (about four times its
    widest layer, in the network's dtype) and some matrices of [in, in]: two of float64 while one is inverted.

    Raises BaseError for a network that is no causal language model, and naming a map whose inputs hold NaN.
    """
    if (kind := kind_of(net)) != "causal":
        raise BaseError(
            f"calibration reads text as a {NAMES['causal']} does, and this base is of another kind ({NAMES[kind]}).\n"
            "  Quantise it without."
        )
    left = {n: m for n, m in net.named_modules() if isinstance(m, FrozenLinear)}
    n_maps, factors = len(left), _Factors()

    def choose(name: str) -> Any:
        def hook(module: FrozenLinear, args: tuple[Tensor, ...]) -> None:
            if left.pop(name, None) is None:
                return  # a module that is called again
            try:
                factor = factors.of(args[0])
                module.frozen = calibrated(
                    QUANTISED[how.name], dense(name), factor, module.frozen.dtype, how.block, how.double_quant
                )
            except (BaseError, torch.linalg.LinAlgError) as problem:  # type: ignore[attr-defined]
                raise BaseError(f"{name} cannot be calibrated: {problem}") from problem
            done = n_maps - len(left)
            if say and done % 50 == 0:
                say(f"calibrated {done} of {n_maps} linear maps")

        return hook

    with _hooked(left, choose):
        net.base_model(input_ids=ids, use_cache=False)
    return sorted(left)


class _Factors:
    """The factor of the input seen last: maps that read the same one follow each other."""

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._factor = torch.empty(0, dtype=torch.float32)

    def of(self, x: Tensor) -> Tensor:
        if x is not self._input:
            self._input, self._factor = x, inverse_factor(second_moment(x))
        return self._factor


@contextmanager
def _hooked(modules: dict[str, FrozenLinear], hook: Callable[[str], Any]) -> Iterator[None]:
    handles: Iterable[Any] = [m.register_forward_pre_hook(hook(n)) for n, m in list(modules.items())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
