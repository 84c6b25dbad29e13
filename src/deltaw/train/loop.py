"""The one training loop: it yields events and knows nothing of terminals or files' names."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.misfits import not_finite, some
from deltaw.data.template import Example
from deltaw.errors import WorkFailed
from deltaw.model.model import Model
from deltaw.train.events import Eval, Event, Step
from deltaw.train.growth import growth, growth_due
from deltaw.train.loss import find_loss
from deltaw.train.optimizer import learning_rate, make_optimizer, optimizer_state, restore_optimizer
from deltaw.train.recipe import Recipe
from deltaw.train.schedule import Schedule
from deltaw.train.step import step_gradient

Evaluate = Callable[[], tuple[float, float | None]]


def peak_rss_mb() -> float | None:
    """The largest resident memory of this process so far, in MB (10^6 bytes); None where it cannot be read."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


@dataclass
class Progress:
    """Where a run stands; what a checkpoint keeps beside parameters and moments.

    step           optimizer steps done
    best           best value of the evaluation metric so far, and how many evaluations since
    loop_s         seconds of the loop so far, over all its processes
    paged_mb       10^6 bytes of optimizer states read and written so far; None: states are not paged
    """

    step: int = 0
    best: float | None = None
    stale: int = 0
    tokens: int = 0
    target_tokens: int = 0
    loop_s: float = 0.0
    loss: float = math.nan
    stopped_early: bool = False
    paged_mb: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


_LOWER = "Lower train.lr or adapter.alpha, or use base.dtype=float32; the last checkpoint is kept."


class Loop:
    """A run's moving parts: parameters, optimizer, schedule, progress. Paged states lie in `folder`, without a name."""

    def __init__(
        self,
        model: Model,
        examples: Sequence[Example],
        recipe: Recipe,
        evaluate: Evaluate | None,
        folder: Path | None = None,
    ) -> None:
        self.model = model
        self.examples = examples
        self.recipe = recipe
        self.evaluate = evaluate
        self.parameters: dict[str, Tensor] = model.trainable()
        self.optimizer = make_optimizer(self.parameters, recipe.train, folder, model.places.sites.values())
        self.schedule = Schedule([len(e.input_ids) for e in examples], recipe.train)
        self.progress = Progress()
        self._loss = find_loss(recipe.train.loss)

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments by name."""
        moments = optimizer_state(self.optimizer, self.parameters)
        return {f"p|{n}": t for n, t in self.parameters.items()} | {f"o|{n}": t for n, t in moments.items()}

    def restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Go on from what `state` and `progress` were."""
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(tensors[f"p|{name}"])
        moments = {n.removeprefix("o|"): t for n, t in tensors.items() if n.startswith("o|")}
        restore_optimizer(self.optimizer, self.parameters, moments)
        self.progress = Progress(**progress)

    def run(self) -> Iterator[Event]:
        """Step until the end, yielding each step and evaluation. State is consistent whenever it yields."""
        progress = self.progress
        began, before = time.perf_counter(), progress.loop_s
        while not self.finished:
            yield self._step()
            progress.loop_s = before + time.perf_counter() - began
            if self.eval_due():
                yield self._evaluate()
            progress.loop_s = before + time.perf_counter() - began

    def refuse_broken(self) -> None:
        """Raise WorkFailed where the last update left a parameter with NaN or Inf: it is no result."""
        if bad := not_finite(self.parameters):
            raise WorkFailed(f"Step {self.progress.step} left NaN or Inf in {some(bad)}. {_LOWER}")

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.progress.step >= self.schedule.n_steps or self.progress.stopped_early

    def eval_due(self) -> bool:
        """Whether an evaluation follows the step just done."""
        step, every = self.progress.step, self.recipe.eval.every_steps
        at_rhythm = step % every == 0 if every else self.schedule.ends_epoch(step)
        return self.evaluate is not None and (at_rhythm or step == self.schedule.n_steps)

    def _step(self) -> Step:
        spec, progress = self.recipe.train, self.progress
        began = time.perf_counter()
        rows = self.schedule.rows(progress.step)
        loss, tokens, targets = step_gradient(
            self.model,
            [self.examples[i] for i in rows],
            self._loss,
            micro_tokens=spec.micro_tokens,
            checkpointing=spec.checkpointing,
            seed=spec.seed * 1_000_000 + progress.step,
        )
        norm = float(self._clip(spec.clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            where = ", ".join(self.examples[i].where for i in rows[:3])
            raise WorkFailed(
                f"Step {progress.step + 1}: loss is {loss}, gradient norm {norm}. Rows of this step: {where}, ... "
                f"{_LOWER}"
            )
        lr = learning_rate(progress.step, self.schedule.n_steps, spec)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.tokens += tokens
        progress.target_tokens += targets
        progress.loss = loss
        moved = self.optimizer.moved_bytes
        if moved is not None:
            progress.paged_mb = (progress.paged_mb or 0.0) + moved / 1e6
        took = time.perf_counter() - began
        return Step(
            step=progress.step,
            epoch=round(self.schedule.epochs_done(progress.step), 4),
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=tokens,
            target_tokens=targets,
            seconds=took,
            tokens_per_s=tokens / took,
            peak_rss_mb=peak_rss_mb(),
            growth=growth(self.model) if growth_due(progress.step, self.schedule.n_steps) else None,
            paged_mb=None if moved is None else moved / 1e6,
        )

    def _clip(self, limit: float) -> Tensor:
        grads = [t for t in self.parameters.values() if t.grad is not None]
        return torch.nn.utils.clip_grad_norm_(grads, limit if limit > 0 else math.inf, foreach=True)

    def _evaluate(self) -> Eval:
        assert self.evaluate is not None
        progress, spec = self.progress, self.recipe.eval
        began = time.perf_counter()
        value, loss = self.evaluate()
        if loss is not None and not math.isfinite(loss):
            raise WorkFailed(f"Step {progress.step}: the loss on the validation rows is {loss} after it. {_LOWER}")
        lower_is_better = spec.metric in ("loss", "perplexity")
        best = progress.best
        better = best is None or (value < best if lower_is_better else value > best)
        if better:
            progress.best, progress.stale = value, 0
        else:
            progress.stale += 1
            progress.stopped_early = spec.patience is not None and progress.stale >= spec.patience
        return Eval(
            step=progress.step,
            metric=spec.metric,
            value=value,
            loss=loss,
            is_best=better,
            seconds=time.perf_counter() - began,
        )
