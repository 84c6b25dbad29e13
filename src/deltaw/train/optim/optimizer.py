"""An optimizer of parts: a rule that updates pieces of parameters, and a store that keeps their states."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.errors import RecipeError, RunError
from deltaw.train.optim.adamw import Piece, Rule
from deltaw.train.optim.pages import PAGE, Page, choose_pages, cut
from deltaw.train.optim.store import Paged, Resident, States, Store
from deltaw.train.optim.workers import MOST, Workers

_WHOLE = 1 << 62


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
        names = [n for g in groups for n in g["params"]]
        self._kinds = [rule.kinds(n, t) for n, t in zip(names, self._parameters, strict=True)]
        self._steps = [torch.zeros((), dtype=torch.float32, device=t.device) for t in self._parameters]
        assert all(t.is_contiguous() for t in self._parameters)
        on_cpu = all(t.device.type == "cpu" for t in self._parameters)
        threads = min(torch.get_num_threads(), MOST)
        if paged and not on_cpu:
            raise RecipeError(
                "train.optimizer.paged is for parameters on the CPU. Remove it: on another device states stay there."
            )
        self._workers = Workers(threads + 1 if paged else threads if on_cpu and threads > 1 else 0)
        budget = None if resident_mb is None else resident_mb * 1e6
        n_slots = self._workers.n_slots
        chosen = choose_pages(self._cut, self._kinds, budget, n_slots, rule.scratch_bytes) if paged else None
        if chosen is not None:
            self._pages, stay = chosen
            self._store: Store = Paged(self._pages, self._kinds, stay, n_slots, folder)
        else:
            self._pages = self._cut(PAGE if on_cpu else _WHOLE)
            self._store = Resident(self._pages, self._kinds, [t.device for t in self._parameters])
        self._largest = max((stop - start for page in self._pages for _, start, stop in page), default=0)

    def _cut(self, most: int) -> list[Page]:
        """Pages of at most `most` elements; none holds parameters of two groups."""
        numbered = list(enumerate(t.numel() for t in self._parameters))
        of_groups = ([s for s in numbered if self._group_of[s[0]] == g] for g in range(len(self.param_groups)))
        return [page for sizes in of_groups for page in cut(sizes, most)]

    @property
    def resident_bytes(self) -> int:
        """Bytes of states in memory, and of buffers and scratch for pages where they are paged."""
        scratch = self._workers.n_slots * self._rule.scratch_bytes(self._largest) if self.moved_bytes is not None else 0
        return self._store.resident_bytes + scratch

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
                Piece(_part(flat[i][0], start, stop), _part(grad, start, stop), self._steps[i], of_segment)
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
            step.copy_(given.pop("step", torch.zeros(())))
            wanted = {k.name: (k.dtype, k.size) for k in kinds}
            found = {n: (s.dtype, s.numel()) for n, s in given.items()}
            if given and found != wanted:
                raise RunError(f"The checkpoint's optimizer states are {found}, and this run's are {wanted}.")
            whole.append(given or {k.name: torch.zeros(k.size, dtype=k.dtype) for k in kinds})
        self._store.load(whole)


def _part(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat if stop - start == flat.numel() else flat[start:stop]
