"""An optimizer of parts: a rule that updates pieces of parameters, and a store that keeps their states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import RunError
from deltaw.train.optim.adamw import Piece, Rule
from deltaw.train.optim.layout import lay_out
from deltaw.train.optim.pages import Shape
from deltaw.train.optim.store import Paged, Resident, States, Store
from deltaw.train.optim.workers import Workers


class Optimizer:
    """Updates every parameter that has a gradient, page by page, several pages at a time.

    groups         like torch.optim's: {"params": {name: tensor}, "lr": ..., and what the rule reads}; settings may
                   change between steps. Parameters are contiguous, and different tensors
    paged          keep states in pages in a file, in `folder`, with `resident_mb` (10^6 bytes; None: a quarter of
                   the states) of states and buffers in memory. The result does not depend on it

    Raises RecipeError for a budget too small or parameters that are not on the CPU, WorkFailed for a full disk.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        rule: Rule,
        folder: Path,
        *,
        paged: bool = False,
        resident_mb: float | None = None,
    ) -> None:
        self._parameters: list[Tensor] = [t for g in groups for t in g["params"].values()]
        self._group_of = [i for i, g in enumerate(groups) for _ in g["params"]]
        self.param_groups = [{**g, "params": list(g["params"].values())} for g in groups]
        self.moved_bytes: int | None = 0 if paged else None
        self._rule = rule
        shapes = [[Shape.of(n, t) for n, t in g["params"].items()] for g in groups]
        layout = lay_out(shapes, rule, paged=paged, resident_mb=resident_mb, threads=torch.get_num_threads())
        self._kinds, self._pages = layout.kinds, layout.pages
        self._steps = [torch.zeros((), dtype=torch.float32, device=t.device) for t in self._parameters]
        assert all(t.is_contiguous() for t in self._parameters)
        self._workers = Workers(layout.n_workers)
        self._scratch_bytes = layout.scratch_bytes
        self._store: Store
        if layout.stay is None:
            self._store = Resident(self._pages, self._kinds, [t.device for t in self._parameters])
        else:
            self._store = Paged(self._pages, self._kinds, layout.stay, self._workers.n_slots, folder)

    @property
    def resident_bytes(self) -> int:
        """Bytes of states in memory, and of buffers and scratch for pages where they are paged."""
        return self._store.resident_bytes + self._scratch_bytes

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient; `moved_bytes` is then what was read and written for it.

        Raises WorkFailed when states cannot be read or written; parameters and states are then of no use.
        """
        flat = [
            (t.detach().view(-1), None if t.grad is None else t.grad.contiguous().view(-1)) for t in self._parameters
        ]
        for step, (_, grad) in zip(self._steps, flat, strict=True):
            if grad is not None:
                step += 1

        def update(page: int, slot: int) -> int:
            segments = self._pages[page]
            states = self._store.open(page, slot)
            pieces = [
                Piece(
                    _part(flat[i][0], start, stop),
                    _part(grad, start, stop),
                    self._steps[i],
                    of_segment,
                    tuple(self._parameters[i].shape),
                )
                for (i, start, stop), of_segment in zip(segments, states, strict=True)
                if (grad := flat[i][1]) is not None
            ]
            self._rule.update(pieces, self.param_groups[self._group_of[segments[0].parameter]])
            return self._store.close(page, slot)

        due = [n for n, page in enumerate(self._pages) if any(flat[s.parameter][1] is not None for s in page)]
        moved = self._workers.each(update, due)
        self.moved_bytes = None if self.moved_bytes is None else moved

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for tensor in self._parameters:
            if set_to_none or tensor.grad is None:
                tensor.grad = None
            else:
                tensor.grad.zero_()

    def state(self) -> dict[Tensor, States]:
        """Each updated parameter's states and "step", shaped as it where they have its size; to be read at once."""
        found: dict[Tensor, States] = {}
        for tensor, step, states in zip(self._parameters, self._steps, self._store.states(), strict=True):
            if float(step):
                shaped = {n: s.view_as(tensor) if s.numel() == tensor.numel() else s for n, s in states.items()}
                found[tensor] = {"step": step, **shaped}
        return found

    def load(self, state: dict[Tensor, States]) -> None:
        """Take over what `state` gave; a parameter that is not in it begins anew.

        Raises RunError for states of another kind or size.
        """
        whole: list[States] = []
        for tensor, step, kinds in zip(self._parameters, self._steps, self._kinds, strict=True):
            given = dict(state.get(tensor, {}))
            step.copy_(given.pop("step", torch.zeros((), dtype=torch.float32)))
            wanted = {k.name: (k.dtype, k.size) for k in kinds}
            found = {n: (s.dtype, s.numel()) for n, s in given.items()}
            if given and found != wanted:
                raise RunError(f"The checkpoint's optimizer states are {found}, and this run's are {wanted}.")
            whole.append(given or {k.name: torch.zeros(k.size, dtype=k.dtype) for k in kinds})
        self._store.load(whole)


def _part(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat if stop - start == flat.numel() else flat[start:stop]
