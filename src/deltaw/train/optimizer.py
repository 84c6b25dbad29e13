"""The optimizer and its learning rate, as plain functions of the step."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from torch import Tensor

from deltaw.train.optim.adamw import AdamW8, AdamW32
from deltaw.train.optim.optimizer import Optimizer
from deltaw.train.recipe import TrainSpec


def make_optimizer(parameters: dict[str, Tensor], spec: TrainSpec, folder: Path | None = None) -> Optimizer:
    """AdamW over `parameters`; with LoRA+, every B learns `lora_plus_ratio` times as fast as the rest.

    Each group carries its `ratio`; weight decay is AdamW's, decoupled. Paged states lie in a file without a name in
    `folder`, by default the system's folder for temporary files.

    Raises RecipeError for a budget of resident bytes that is too small, WorkFailed where the disk is full.
    """
    o = spec.optimizer
    shared = {"lr": spec.lr or 0.0, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    slow = {n: t for n, t in parameters.items() if not n.endswith(":B")}
    fast = {n: t for n, t in parameters.items() if n.endswith(":B")}
    groups = [
        {"params": of_group, "ratio": ratio, **shared}
        for of_group, ratio in ((slow, 1.0), (fast, o.lora_plus_ratio))
        if of_group
    ]
    where = folder if folder is not None else Path(tempfile.gettempdir())
    rule = AdamW8() if o.bits == 8 else AdamW32()
    return Optimizer(groups, rule, where, paged=o.paged, resident_mb=o.resident_mb)


def learning_rate(step: int, n_steps: int, spec: TrainSpec) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `n_steps`.

    Warm-up is linear over warmup_ratio * n_steps steps and reaches `lr` at its last; then the schedule.
    """
    assert spec.lr is not None  # a recipe fills it in
    warm = math.ceil(round(spec.warmup_ratio * n_steps, 9))  # 0.07 * 100 is a little more than 7
    if step < warm:
        return spec.lr * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.lr
    done = (step - warm) / max(1, n_steps - warm)
    left = 0.5 * (1 + math.cos(math.pi * done)) if spec.schedule == "cosine" else 1 - done
    return spec.lr * (spec.final_lr_ratio + (1 - spec.final_lr_ratio) * left)


def optimizer_state(optimizer: Optimizer, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's states and counts by parameter name, to be read at once: the next step changes them.

    Paged states are views of their file, not copies in memory.
    """
    state = optimizer.state()
    return {
        f"{name}|{key}": value for name, tensor in parameters.items() for key, value in state.get(tensor, {}).items()
    }


def restore_optimizer(optimizer: Optimizer, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, bit for bit, paged or not.

    Raises RunError for states of another kind, as 8 bits instead of 32.
    """
    found: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition("|")
        found.setdefault(parameters[name], {})[kind] = value
    optimizer.load(found)
