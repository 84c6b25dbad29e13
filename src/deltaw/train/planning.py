"""What a recipe needs in memory: the real step, traced on the meta device, beside what shapes say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from deltaw.core.checkpoint_files import checkpoint_files
from deltaw.core.site import LinearSite
from deltaw.core.spec import Made
from deltaw.data.pack import split_micro
from deltaw.data.task import given_labels
from deltaw.data.template import Example
from deltaw.errors import BaseError, RecipeError
from deltaw.model.base import best_dtype
from deltaw.model.kinds import wants_labels
from deltaw.model.limits import max_positions, positions_of
from deltaw.model.model import Model
from deltaw.model.quantised import Format, saved_format
from deltaw.plan.memory import resident_bytes
from deltaw.plan.network import Base, find_config, planned_model
from deltaw.plan.plan import Counts, Plan, count
from deltaw.plan.rules import rules_of_thumb
from deltaw.plan.trace import traced
from deltaw.train.loss import find_loss
from deltaw.train.optimizer import plan_optimizer
from deltaw.train.recipe import Recipe, TrainSpec
from deltaw.train.step import mean_loss, step_gradient

EVALUATED_TOKENS = 4096
LOADING_BYTES = 62_000_000
"""What loading leaves beside the weights: the tokenizer, transformers' classes of the architecture, the heap's holes.
Measured: 55 to 66 MB (docs/planner.md)."""
IMPORTS_BYTES = 358_000_000
"""Resident memory of Python, torch and transformers where it cannot be read."""
BESIDE_SHARE = {"float32": 0.08, "bfloat16": 0.2, "float16": 0.2, "float64": 0.08}
"""What kernels take beside the tensors that PyTorch sees (oneDNN's copies and accumulators), over the live bytes of a
step; by the dtype that is computed in. Measured on this project's machine (docs/planner.md)."""

BESIDE_FUSED = 80_000_000
"""The same where blocks are fused, whatever the step. Measured: 60 to 110 MB."""

AGAIN_BYTES = 150_000_000
"""What the heap keeps of blocks that are computed again, beyond its model, at most half of what is alive.
Measured: 0 to 300 MB (docs/planner.md)."""

Documents = Sequence[tuple[int, int]]
"""(tokens, target tokens) of each document of one optimizer step."""


@dataclass(frozen=True)
class Work:
    """What is computed: documents of a step, and of the largest pack of an evaluation (none: no evaluation)."""

    step: Documents
    evaluation: Documents = ()

    @classmethod
    def of_rows(cls, batch: int, length: int, learned: float = 1.0) -> Work:
        """`batch` rows of `length` tokens, of which the last part `learned` are targets (never the first token)."""
        targets = min(length - 1, max(1, round(learned * length)))
        return cls([(length, targets)] * batch)


class Planner:
    """Plans one recipe's base and method; traces are kept, so that many settings are cheap to compare.

    imports   bytes of Python and its libraries in the process that will train; None: what this process has now
    """

    def __init__(self, recipe: Recipe, work: Work, imports: int | None = None) -> None:
        self.recipe = recipe
        self.work = work
        self.config, self.folder = find_config(recipe.base.path)
        if wants_labels(self.config) or recipe.data.labels is not None:  # a text has one label behind it
            self.work = Work([(n if t == 1 else n + 1, 1) for n, t in work.step], work.evaluation)
        self.runtime = (imports or resident_bytes() or IMPORTS_BYTES) + LOADING_BYTES
        self._models: dict[Base, tuple[Model, Counts]] = {}
        self._traces: dict[tuple[Any, ...], dict[str, int]] = {}
        self._optimizers: dict[tuple[Any, ...], int] = {}

    def base_of(self, recipe: Recipe) -> Base:
        """The base as the recipe keeps it; a base saved in 4 bits is kept as it is."""
        b = recipe.base
        dtype = best_dtype(recipe.adapter.trains_base) if b.dtype == "auto" else b.dtype
        how = Format(b.format, b.block, b.double_quant) if b.format != "dense" else saved_format(self.config)
        kept = ("dense", 64, False) if how is None else (how.name, how.block, how.double_quant)
        labels = given_labels(recipe.data)
        return Base(
            b.path,
            _Hashed(self.config),
            self.folder,
            *kept,
            dtype=dtype,
            labels=None if labels is None else tuple(labels),
        )

    def plan(self, recipe: Recipe | None = None) -> Plan:
        """The plan of `recipe`, which may differ from the first one in format, micro_tokens, checkpointing, optimizer.

        Raises what training it would raise: TargetError, BaseError, RecipeError for a quantised base that trains.
        """
        recipe = self.recipe if recipe is None else recipe
        base = self.base_of(recipe)
        model, counts = self._model(base, recipe)
        counts = replace(counts, optimizer=self._optimizer(base, model, recipe.train))
        kept = {"weights": counts.weights, "constants": counts.constants, "runtime": self.runtime}
        attached = kept | {"adapter": counts.adapter, "optimizer": counts.optimizer}
        moments = {
            "load": kept | self._while_loading(base, counts),
            "loaded": kept,
            "step": attached | self._step(base, model, recipe.train),
            "update": attached | {"gradients": counts.gradients},
        }
        if self.work.evaluation:
            moments["evaluation"] = attached | self._evaluation(base, model, recipe.train)
        return Plan(recipe.base.path, counts, moments, self._settings(base, recipe), rules=rules_of_thumb(counts))

    def _optimizer(self, base: Base, model: Model, train: TrainSpec) -> int:
        key = base, train.optimizer, train.threads
        if key not in self._optimizers:
            self._optimizers[key] = optimizer_bytes(model.trainable(), train, model.places.sites.values())
        return self._optimizers[key]

    def _model(self, base: Base, recipe: Recipe) -> tuple[Model, Counts]:
        if base not in self._models:
            if recipe.adapter.trains_base and base.format != "dense":
                raise RecipeError(f"method 'full' trains the base itself; in {base.format} it is only read. Use dense.")
            model = planned_model(base, recipe.adapter)
            limit = max_positions(model.net)
            longest = max(positions_of(model.net, n, t) for n, t in self.work.step)
            if limit is not None and longest + model.n_before > limit:
                beside = f" beside {model.n_before} virtual tokens" if model.n_before else ""
                raise BaseError(
                    f"rows of {longest} tokens, and this base has {limit} positions{beside}: "
                    f"use {limit - model.n_before} or fewer."
                )
            self._models[base] = model, count(model.net, model.trainable(), *held_and_stored(model))
        return self._models[base]

    def micro_batches(self, train: TrainSpec) -> list[list[tuple[int, int]]]:
        """The step's micro-batches: all, or where there are more than two the heaviest twice (gradients add up)."""
        documents = list(self.work.step)
        micros = [
            [documents[i] for i in micro]
            for micro in split_micro(range(len(documents)), [n for n, _ in documents], train.micro_tokens)
        ]
        if len(micros) < 2:
            return micros
        heaviest = max(micros, key=lambda m: (sum(n for n, _ in m), sum(n * n for n, _ in m), sum(t for _, t in m)))
        return [heaviest, heaviest]

    def _step(self, base: Base, model: Model, train: TrainSpec) -> dict[str, int]:
        micros = self.micro_batches(train)
        loss = find_loss(train.loss)

        def work() -> None:
            for documents in micros:
                step_gradient(model, _examples(documents), loss, checkpointing=train.checkpointing, seed=1)

        found = self._traced(("step", base, str(micros), train.checkpointing, train.loss), model, work)
        if not train.checkpointing or model.why_plain() is None:
            return found
        live = sum(size for cause, size in found.items() if cause != "allocator")
        return found | {"allocator": found["allocator"] + min(AGAIN_BYTES, live // 2)}

    def _evaluation(self, base: Base, model: Model, train: TrainSpec) -> dict[str, int]:
        loss = find_loss(train.loss)

        def work() -> None:
            mean_loss(model, _examples(self.work.evaluation), loss, EVALUATED_TOKENS)

        return self._traced(("evaluation", base, train.loss), model, work)

    def _traced(self, key: tuple[Any, ...], model: Model, work: Any) -> dict[str, int]:
        if key not in self._traces:
            parameters = list(model.trainable().values())
            known = [*model.net.parameters(), *model.net.buffers(), *parameters]
            wide = model.net.config.get_text_config().vocab_size
            timeline = traced(work, known, parameters, wide)
            found = timeline.peak()
            for tensor in parameters:
                tensor.grad = None
            live = sum(found.values())
            if model.why_plain() is None:  # an arena has no holes
                beside = BESIDE_FUSED
            else:
                share = BESIDE_SHARE[str(model.net.dtype).removeprefix("torch.")]
                beside = max(0, timeline.held() - live) + round(share * live)
            self._traces[key] = found | {"allocator": beside}
        return self._traces[key]

    def _while_loading(self, base: Base, counts: Counts) -> dict[str, int]:
        """Pages of the checkpoint's files, and temporaries. Weights in the file's dtype stay in the file's pages."""
        if base.folder is None:
            return {}
        try:
            size = sum(f.stat().st_size for f in checkpoint_files(base.folder))
        except BaseError:
            return {}
        dense = base.format == "dense" and math.isclose(size, counts.weights, rel_tol=0.02)
        largest = self._models[base][0].net.get_input_embeddings().weight
        checked = largest.numel() * (largest.element_size() + 2)  # `isfinite` of the largest tensor
        return {"workspace": checked} if dense else {"file": size}

    def _settings(self, base: Base, recipe: Recipe) -> dict[str, Any]:
        train = recipe.train
        micros = self.micro_batches(train)
        return {
            "format": base.format,
            "block": base.block if base.format != "dense" else None,
            "double_quant": base.double_quant,
            "dtype": base.dtype,
            "adapter": recipe.adapter.model_dump(mode="json"),
            "rows": len(self.work.step),
            "length": max(n for n, _ in self.work.step),
            "tokens": sum(n for n, _ in self.work.step),
            "target_tokens": sum(t for _, t in self.work.step),
            "micro_rows": max(len(m) for m in micros),
            "micro_tokens": train.micro_tokens,
            "checkpointing": train.checkpointing,
            "optimizer": train.optimizer.model_dump(mode="json"),
        }


class _Hashed(dict[str, Any]):
    """A config as part of a key: a planner has one only."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0


def held_and_stored(model: Model) -> tuple[dict[str, Tensor], int]:
    """The tensors of a planned adapter, and how many numbers its file would hold."""
    held = {k: t for made in model.adapters.values() for k, t in made.tensors().items()}
    made = next(iter(model.adapters.values()))
    if made.spec.trains_base:
        return held, sum(p.numel() for p in model.net.parameters())
    settled = made.spec.settled(Made(made.spec, made.sites, made.shared), made.places)
    kept = [t for params in settled.sites.values() for t in params.values()] + list(settled.shared.values())
    kept += [*made.swaps.values(), *(value for _, value in made.rows.values())]
    return held, sum(t.numel() for t in kept)


def _examples(documents: Documents) -> list[Example]:
    return [Example((0,) * n, tuple(i >= n - t for i in range(n)), "planned") for n, t in documents]


def optimizer_bytes(parameters: dict[str, Tensor], train: TrainSpec, sites: Iterable[LinearSite] = ()) -> int:
    """Bytes of the optimizer's states in memory; when paged, those that stay, the buffers and the scratch.

    It is what `Optimizer.resident_bytes` then says. Raises RecipeError for settings that the optimizer would refuse.
    """
    return plan_optimizer(parameters, train, sites).resident_bytes
