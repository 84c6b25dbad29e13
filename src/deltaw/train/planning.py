"""What a recipe needs in memory: the real step, traced on the meta device, beside what shapes say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
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
from deltaw.plan.kept import Kept, Key, Planned
from deltaw.plan.memory import resident_bytes
from deltaw.plan.network import Base, find_config, planned_base, planned_model, with_adapter
from deltaw.plan.plan import Plan, count
from deltaw.plan.repeat import Unlike, repeated
from deltaw.plan.rules import rules_of_thumb
from deltaw.plan.short import Short, deepen, is_alike, shortened
from deltaw.plan.timeline import Timeline
from deltaw.plan.trace import traced
from deltaw.train.loss import find_loss
from deltaw.train.optimizer import plan_optimizer
from deltaw.train.recipe import Recipe, TrainSpec
from deltaw.train.step import mean_loss, step_gradient

EVALUATED_TOKENS = 4096
MOST_TOKENS = 2**22
"""Tokens of an assumed step: more would take longer to plan, and more memory, than somebody waits for."""
LOADING_BYTES = 45_000_000
"""What loading leaves beside the weights: the tokenizer, transformers' classes of the architecture.
Measured: 33 to 47 MB (docs/planner.md)."""
IMPORTS_BYTES = 358_000_000
"""Resident memory of Python, torch and transformers where it cannot be read."""
KERNEL_BYTES, COMPILED_BYTES = 13_000_000, 15_000_000
"""What a run's first steps take beside tensors: code that is used for the first time, Python's objects; and, where
products are not in bfloat16, oneDNN's compiled kernels. Measured: 7 to 17 MB, in float32 23 to 39; through a model's
own code 16 to 43 (docs/planner.md)."""

Documents = Sequence[tuple[int, int]]
"""(tokens, target tokens) of each document of one optimizer step."""


@dataclass(frozen=True)
class Work:
    """What is computed: documents of a step, and of the largest pack of an evaluation (none: no evaluation).

    common   the tokens that all documents of the step begin with: computed once where blocks are fused (`data.needed`)
    """

    step: Documents
    evaluation: Documents = ()
    common: int = 0

    @classmethod
    def of_rows(cls, batch: int, length: int, learned: float = 1.0) -> Work:
        """`batch` rows of `length` tokens, of which the last part `learned` are targets (never the first token).

        Raises RecipeError for a step of more than MOST_TOKENS.
        """
        if batch * length > MOST_TOKENS:
            raise RecipeError(
                f"a step of {batch:,} rows of {length:,} tokens (train.tokens_per_step) is more than can be planned; "
                f"{MOST_TOKENS:,} tokens is the most."
            )
        targets = min(length - 1, max(1, round(learned * length)))
        return cls([(length, targets)] * batch)


class Planner:
    """Plans one recipe's base and method; traces are kept, so that many settings are cheap to compare.

    imports   bytes of Python and its libraries in the process that will train; None: what this process had when it
              first planned (later its code's pages may be gone from memory, or a model may be in it)
    kept      what other planners have made, which this one goes on with; None: nothing
    whole     trace every block. Else a network whose blocks are alike is traced on a few of them (plan/short.py), and
              what they do is repeated: the plan is the same
    """

    def __init__(
        self,
        recipe: Recipe,
        work: Work,
        imports: int | None = None,
        *,
        kept: Kept | None = None,
        whole: bool = False,
    ) -> None:
        self.recipe = recipe
        self.work = work
        self.config, self.folder = find_config(recipe.base.path)
        if wants_labels(self.config) or recipe.data.labels is not None:  # a text has one label behind it
            self.work = replace(work, step=[(n if t == 1 else n + 1, 1) for n, t in work.step])
        self.runtime = (imports or _imports()) + LOADING_BYTES
        self._whole = whole
        self._kept = Kept() if kept is None else kept

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
        planned = self._made(base, recipe)
        self._check_length(planned.model)
        counts = replace(planned.counts, optimizer=self._optimizer(base, planned, recipe))
        kept = {"weights": counts.weights, "constants": counts.constants, "runtime": self.runtime}
        attached = kept | {"adapter": counts.adapter, "optimizer": counts.optimizer}
        moments = {
            "load": kept | self._while_loading(base, planned),
            "loaded": kept,
            "step": attached | self._step(base, recipe),
            "update": attached | {"gradients": counts.gradients},
        }
        if self.work.evaluation:
            moments["evaluation"] = attached | self._evaluation(base, recipe)
        return Plan(recipe.base.path, counts, moments, self._settings(base, recipe), rules=rules_of_thumb(counts))

    def _key(self, base: Base, recipe: Recipe) -> Key:
        return base, recipe.adapter.model_dump_json(), self._whole

    def _optimizer(self, base: Base, planned: Planned, recipe: Recipe) -> int:
        train = recipe.train
        key = *self._key(base, recipe), train.optimizer.model_dump_json(), train.threads
        if (found := self._kept.optimizers.get(key)) is not None:
            return found
        return self._kept.keep(self._kept.optimizers, key, self._states(planned, train))

    def _states(self, planned: Planned, train: TrainSpec) -> int:
        parameters, sites, short = planned.model.trainable(), planned.model.places.sites, planned.short
        if short is None:
            return optimizer_bytes(parameters, train, sites.values())
        if train.optimizer.paged or train.optimizer.name == "galore":  # what one takes depends on the others
            return optimizer_bytes(short.whole(parameters), train, short.sites(sites).values())
        found = optimizer_bytes(parameters, train)
        inner = {n: t for n, t in parameters.items() if short.times(n) > 1}
        return found + (short.more * optimizer_bytes(inner, train) if inner else 0)

    def _made(self, base: Base, recipe: Recipe) -> Planned:
        if (found := self._kept.models.get(self._key(base, recipe))) is not None:
            self._kept.models.move_to_end(self._key(base, recipe))
            return found
        if recipe.adapter.trains_base and base.format != "dense":
            raise RecipeError(f"method 'full' trains the base itself; in {base.format} it is only read. Use dense.")
        low = 2 if recipe.adapter.sits in ("block", "cache") else 1  # where a backward ends before the first block
        short = None if self._whole else shortened(base.config, base.labels, low)
        if short is None or not is_alike(short, recipe.adapter, bare := self._bare(base, short)):
            return self._make_whole(base, recipe)
        model = with_adapter(bare, base, recipe.adapter)
        model.run.blocks = short.blocks
        counts = count(model.net, model.trainable(), *held_and_stored(model, short.times), short.times)
        return self._kept.keep(self._kept.models, self._key(base, recipe), Planned(model, counts, short))

    def _bare(self, base: Base, short: Short) -> Model:
        """The short network without an adapter: the one that another adapter leaves, where there is one."""
        made = self._kept.models
        free = (k for k, p in made.items() if k[0] == base and p.short == short and not p.trains_base)
        if (key := next(free, None)) is not None:
            model = made.pop(key).model
            model.detach()
            return model
        model = planned_base(replace(base, config=_Hashed(short.config)))
        deepen(model, short)
        return model

    def _make_whole(self, base: Base, recipe: Recipe) -> Planned:
        model = planned_model(base, recipe.adapter)
        made = Planned(model, count(model.net, model.trainable(), *held_and_stored(model)))
        return self._kept.keep(self._kept.models, self._key(base, recipe), made)

    def _check_length(self, model: Model) -> None:
        limit = max_positions(model.net)
        longest = max(positions_of(model.net, n, t) for n, t in self.work.step)
        if limit is not None and longest + model.n_before > limit:
            beside = f" beside {model.n_before} virtual tokens" if model.n_before else ""
            raise BaseError(
                f"rows of {longest} tokens, and this base has {limit} positions{beside}: "
                f"use {limit - model.n_before} or fewer."
            )

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

    def _step(self, base: Base, recipe: Recipe) -> dict[str, int]:
        train = recipe.train
        micros = self.micro_batches(train)
        loss = find_loss(train.loss)

        def work(model: Model) -> None:
            step_gradient(
                model, _examples(micros[0], self.work.common), loss, checkpointing=train.checkpointing, seed=1
            )

        what = ("step", str(micros), self.work.common, train.checkpointing, train.loss)
        return self._traced(what, base, recipe, work, len(micros) > 1)

    def _evaluation(self, base: Base, recipe: Recipe) -> dict[str, int]:
        loss = find_loss(recipe.train.loss)

        def work(model: Model) -> None:
            mean_loss(model, _examples(self.work.evaluation), loss, EVALUATED_TOKENS)

        return self._traced(("evaluation", str(self.work.evaluation), recipe.train.loss), base, recipe, work)

    def _traced(
        self, what: Key, base: Base, recipe: Recipe, work: Callable[[Model], None], twice: bool = False
    ) -> dict[str, int]:
        key = *self._key(base, recipe), *what
        of_any = *self._key(replace(base, format="any", block=0, double_quant=False), recipe), *what
        traces = self._kept.traces
        if (known := traces.get(key)) is not None:
            return known
        if (known := traces.get(of_any)) is not None and self._made(base, recipe).of_any_format:
            return known
        timeline = self._timeline(base, recipe, work, twice)
        found = timeline.peak()
        beside = max(0, timeline.arena() + timeline.held() - sum(found.values())) + KERNEL_BYTES
        found["allocator"] = beside if base.dtype == "bfloat16" else beside + COMPILED_BYTES
        if base.format == "dense" and not timeline.reads:
            self._kept.keep(traces, of_any, found)
        return self._kept.keep(traces, key, found)

    def _timeline(self, base: Base, recipe: Recipe, work: Callable[[Model], None], twice: bool) -> Timeline:
        """What `traced` says: of the short network, repeated, or of the deep one where that cannot be."""
        planned = self._made(base, recipe)
        model, short = planned.model, planned.short
        parameters = list(model.trainable().values())
        known = planned.known
        wide = model.net.config.get_text_config().vocab_size
        try:
            line = traced(
                lambda: work(model),
                known.values(),
                parameters,
                wide,
                None if short is None else short.parts(known),
                model.arena,
                self._whole,
                twice,
                planned.of_maps,
            )
        finally:
            for tensor in parameters:
                tensor.grad = None
        if short is None:
            return line
        try:
            whole = repeated(line, short.units, short.low)
            whole.lent, whole.unseen, whole.reads = line.lent, line.unseen, line.reads  # as much in every unit
            return whole
        except Unlike:
            self._make_whole(base, recipe)
            return self._timeline(base, recipe, work, twice)

    def _while_loading(self, base: Base, planned: Planned) -> dict[str, int]:
        """Pages of the checkpoint's files. Weights in the file's dtype stay in the file's pages."""
        if base.folder is None:
            return {}
        try:
            size = sum(f.stat().st_size for f in checkpoint_files(base.folder))
        except BaseError:
            return {}
        dense = base.format == "dense" and math.isclose(size, planned.counts.weights, rel_tol=0.02)
        return {} if dense else {"file": size}

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


@cache
def _imports() -> int:
    return resident_bytes() or IMPORTS_BYTES


class _Hashed(dict[str, Any]):
    """A config as part of a key: a planner has one only."""

    def __hash__(self) -> int:  # type: ignore[override]
        return 0


def held_and_stored(model: Model, times: Callable[[str], int] = lambda _: 1) -> tuple[dict[str, Tensor], int]:
    """The tensors of a planned adapter, and how many numbers its file would hold. times: as `count` takes it."""
    held = {k: t for made in model.adapters.values() for k, t in made.tensors().items()}
    made = next(iter(model.adapters.values()))
    if made.spec.trains_base:
        return held, sum(times(n) * p.numel() for n, p in model.net.named_parameters())
    settled = made.spec.settled(Made(made.spec, made.sites, made.shared), made.places)
    kept = [(n, t) for n, params in settled.sites.items() for t in params.values()]
    kept += [*(("", t) for t in settled.shared.values()), *made.swaps.items()]
    kept += [("", value) for _, value in made.rows.values()]
    return held, sum(times(n) * t.numel() for n, t in kept)


def _examples(documents: Documents, common: int = 0) -> list[Example]:
    """Documents that begin with the same `common` tokens and are unlike behind them."""
    ids = [(0,) * min(common, n) + (doc,) * (n - common) for doc, (n, _) in enumerate(documents, 1)]
    flags = [tuple(i >= n - t for i in range(n)) for n, t in documents]
    return [Example(*tokens, "planned") for tokens in zip(ids, flags, strict=True)]


def optimizer_bytes(parameters: dict[str, Tensor], train: TrainSpec, sites: Iterable[LinearSite] = ()) -> int:
    """Bytes of the optimizer's states in memory; when paged, those that stay, the buffers and the scratch.

    It is what `Optimizer.resident_bytes` then says. Raises RecipeError for settings that the optimizer would refuse.
    """
    return plan_optimizer(parameters, train, sites).resident_bytes
