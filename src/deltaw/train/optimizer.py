"""The optimizer and its learning rate, as plain functions of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deltaw.train.recipe import TrainSpec


def make_optimizer(parameters: dict[str, Tensor], spec: TrainSpec) -> torch.optim.AdamW:
    """AdamW over `parameters`; with LoRA+, every B learns `lora_plus_ratio` times as fast as the rest.

    Each group carries its `ratio`; weight decay is AdamW's, decoupled.
    """
    o = spec.optimizer
    slow = [t for n, t in parameters.items() if not n.endswith(":B")]
    fast = [t for n, t in parameters.items() if n.endswith(":B")]
    groups = [
        {"params": tensors, "ratio": ratio} for tensors, ratio in ((slow, 1.0), (fast, o.lora_plus_ratio)) if tensors
    ]
    return torch.optim.AdamW(groups, lr=spec.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=True)


def learning_rate(step: int, n_steps: int, spec: TrainSpec) -> float:
    """The learning rate of optimizer step `step`, counted from 0, of `n_steps`.

    Warm-up is linear over warmup_ratio * n_steps steps and reaches `lr` at its last; then the schedule.
    """
    warm = math.ceil(round(spec.warmup_ratio * n_steps, 9))  # 0.07 * 100 is a little more than 7
    if step < warm:
        return spec.lr * (step + 1) / warm
    if spec.schedule == "constant":
        return spec.lr
    done = (step - warm) / max(1, n_steps - warm)
    left = 0.5 * (1 + math.cos(math.pi * done)) if spec.schedule == "cosine" else 1 - done
    return spec.lr * (spec.final_lr_ratio + (1 - spec.final_lr_ratio) * left)


def optimizer_state(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdamW's moments and counts by parameter name."""
    return {
        f"{name}|{key}": value
        for name, tensor in parameters.items()
        for key, value in optimizer.state.get(tensor, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.AdamW, parameters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, bit for bit."""
    for name, tensor in parameters.items():
        found = {k.rpartition("|")[2]: v for k, v in state.items() if k.rpartition("|")[0] == name}
        if found:
            optimizer.state[tensor] = found
