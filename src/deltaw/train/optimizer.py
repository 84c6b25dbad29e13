"""The optimizer and its learning rate, as plain functions of the step."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltaw.core.site import LinearSite
from deltaw.core.targets import ALL_LINEAR, matches
from deltaw.errors import RecipeError, near
from deltaw.train.optim.adamw import AdamW8, AdamW32, Rule
from deltaw.train.optim.galore import GaLore
from deltaw.train.optim.layout import Layout, lay_out
from deltaw.train.optim.optimizer import Optimizer
from deltaw.train.optim.pages import Shape
from deltaw.train.optim.settings import OptimizerSpec
from deltaw.train.recipe import TrainSpec

HELD = 0.6
"""Share of the steps, warm-up included, after which the learning rate of schedule hold falls."""


def make_optimizer(
    parameters: dict[str, Tensor], spec: TrainSpec, folder: Path | None = None, sites: Iterable[LinearSite] = ()
) -> Optimizer:
    """AdamW over `parameters`; with LoRA+, every B learns `lora_plus_ratio` times as fast as the rest.

    Each group carries its `ratio`; weight decay is AdamW's, decoupled. Paged states lie in a file without a name in
    `folder`, by default the system's folder for temporary files. GaLore projects matrices at the model's `sites`.

    Raises RecipeError for a budget of resident bytes that is too small, for LoRA+ without any B, for GaLore's targets
    that are not there or none above its rank; WorkFailed where the disk is full.
    """
    o = spec.optimizer
    shared = {"lr": spec.lr or 0.0, "betas": o.betas, "eps": o.eps, "weight_decay": o.weight_decay}
    groups = [{"params": of_group, "ratio": ratio, **shared} for of_group, ratio in _groups(parameters, o)]
    where = folder if folder is not None else Path(tempfile.gettempdir())
    rule = _rule({n: Shape.of(n, t) for n, t in parameters.items()}, o, sites)
    return Optimizer(groups, rule, where, paged=o.paged, resident_mb=o.resident_mb)


def plan_optimizer(parameters: dict[str, Tensor], spec: TrainSpec, sites: Iterable[LinearSite] = ()) -> Layout:
    """How `make_optimizer` would lay out the states of these parameters on the CPU; they may be on the meta device.

    Raises RecipeError as it does.
    """
    o = spec.optimizer
    shapes = {n: Shape.of(n, t, "cpu") for n, t in parameters.items()}
    rule = _rule(shapes, o, sites)
    groups = [[shapes[n] for n in of_group] for of_group, _ in _groups(parameters, o)]
    threads = spec.threads or torch.get_num_threads()
    return lay_out(groups, rule, paged=o.paged, resident_mb=o.resident_mb, threads=threads)


def _groups(parameters: dict[str, Tensor], o: OptimizerSpec) -> list[tuple[dict[str, Tensor], float]]:
    """Parameters that learn equally fast, and how fast."""
    slow = {n: t for n, t in parameters.items() if not n.endswith(":B")}
    fast = {n: t for n, t in parameters.items() if n.endswith(":B")}
    if o.lora_plus_ratio != 1 and not fast:
        named = "is lora_plus" if o.name == "lora_plus" else f"has lora_plus_ratio {o.lora_plus_ratio:g}"
        raise RecipeError(f"train.optimizer {named}, and this method has no matrices A and B. Use plain adamw.")
    return [(of_group, ratio) for of_group, ratio in ((slow, 1.0), (fast, o.lora_plus_ratio)) if of_group]


def _rule(shapes: Mapping[str, Shape], o: OptimizerSpec, sites: Iterable[LinearSite]) -> Rule:
    adam = AdamW8() if o.bits == 8 else AdamW32()
    if o.name != "galore":
        return adam
    targets = [of for of in _targets(shapes, o, list(sites)) if len(of.sizes) == 2]
    projected = [of for of in targets if min(of.sizes) > o.rank]
    if not projected:
        largest = max((min(of.sizes) for of in targets), default=0)
        raise RecipeError(
            f"train.optimizer.rank is {o.rank}, and no matrix that galore would project has both sides above it "
            f"(the largest shorter side is {largest}): nothing would be projected. Lower it, or use name: adamw."
        )
    return GaLore(adam, projected, rank=o.rank, update_every=o.update_every, scale=o.scale)


def _targets(shapes: Mapping[str, Shape], o: OptimizerSpec, sites: list[LinearSite]) -> list[Shape]:
    """The weights that `targets` means, in the model's order. RecipeError when a name matches none."""
    there = [s for s in sites if f"{s.name}.weight" in shapes]
    if o.targets == ALL_LINEAR:
        chosen = [s for s in there if s.kind != "embedding" and not s.is_head]
    else:
        chosen = [s for s in there if matches(o.targets, s.name)]
        asked: list[Any] = [o.targets] if isinstance(o.targets, str) else [[name] for name in o.targets]
        for one in asked:
            if not any(matches(one, s.name) for s in there):
                name, roles = one if isinstance(one, str) else one[0], sorted({s.role for s in there})
                raise RecipeError(
                    f"train.optimizer.targets: {name!r} matches no weight of this model.{near(name, roles)} "
                    f"It has: {', '.join(roles)}."
                )
    return [shapes[f"{s.name}.weight"] for s in chosen]


def learning_rate(step: int, n_steps: int, spec: TrainSpec) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `n_steps`.

    Warm-up is linear over warmup_ratio * n_steps steps and reaches `lr` at its last; then the schedule. `hold` stays
    there for a while, and is linear afterwards (arXiv:2405.18392).
    """
    assert spec.lr is not None  # a recipe fills both in
    assert spec.schedule is not None
    warm = math.ceil(round(spec.warmup_ratio * n_steps, 9))  # 0.07 * 100 is a little more than 7
    if step < warm:
        return spec.lr * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.lr
    falls = max(warm, HELD * n_steps) if spec.schedule == "hold" else warm  # the step at which it begins to fall
    done = max(0.0, step - falls) / max(1, n_steps - falls)
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
