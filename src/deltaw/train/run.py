"""A run from a recipe to a saved adapter, resumable at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from deltaw.data.pack import Batch, collate, split_micro
from deltaw.data.source import Row, data_hash, read_rows
from deltaw.data.task import given_labels, read_labels
from deltaw.data.template import Encoded, encode_all
from deltaw.errors import RecipeError, RunError
from deltaw.model.base import best_dtype, check_device, load_base, task_before
from deltaw.model.limits import refuse_beyond
from deltaw.model.load import load_tokenizer
from deltaw.model.model import Model
from deltaw.model.quiet import quiet
from deltaw.ops import pool
from deltaw.plan.memory import release_free_memory
from deltaw.plan.plan import Plan
from deltaw.store.files import space_explained, whole_folder, write_text
from deltaw.store.peft import write_adapter
from deltaw.train.checkpoint import (
    begin_run,
    find_run,
    locked,
    machine,
    newest_checkpoint,
    save_checkpoint,
    versions,
)
from deltaw.train.evaluate import check_rows, evaluate_rows
from deltaw.train.events import Done, Eval, Event, Saved, Start
from deltaw.train.fitting import chosen_before, fit, keep_choice, planned_event, work_of
from deltaw.train.loop import Evaluate, Loop, peak_rss_mb
from deltaw.train.loss import find_loss
from deltaw.train.planning import Planner
from deltaw.train.recipe import Recipe, load_recipe
from deltaw.train.sinks import MetricsFile, TensorBoard
from deltaw.train.step import mean_loss

CALIBRATION_TOKENS = 65_536
"""Of training rows that are read before the first step by a method that starts from them."""

Rows = str | Path | Iterable[Mapping[str, Any]]


def train(
    recipe: str | Path | dict[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    overrides: Iterable[str] = (),
    train_rows: Rows | None = None,
    valid_rows: Rows | None = None,
    allow_other_machine: bool = False,
    parents: Iterable[str] = (),
    say: Callable[[str], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Event]:
    """Train what `recipe` says, yielding events; the last is Done, or Saved where `stop` ended the run.

    out                  the run's folder, "runs/<recipe's name>" by default. The same recipe and data in the
                         same folder go on where they stopped, bit for bit; another run there is refused
    overrides            "key=value" settings on top of the recipe
    train_rows           rows in memory (or a path) instead of data.train; valid_rows likewise
    allow_other_machine  go on although machine, threads or versions differ from when the run began
    parents              ids of the adapters that this one follows, for its provenance
    stop                 asked after each step (and its evaluation): True keeps a checkpoint there and ends the run

    Raises RecipeError, DataError, RunError, ... for bad input, WorkFailed when the loss is not finite or the
    disk is full. Nothing runs before the first event is asked for.
    """
    loaded = _with_labels(load_recipe(recipe, list(overrides)))
    check_device(loaded.base.device)
    name = Path(recipe).stem if isinstance(recipe, str | Path) else "run"
    folder = Path(out) if out is not None else Path("runs") / name
    if loaded.train.threads:
        torch.set_num_threads(loaded.train.threads)
    rows = _rows(train_rows if train_rows is not None else loaded.data.train, "data.train")
    valid_source = valid_rows if valid_rows is not None else loaded.data.valid
    valid = _rows(valid_source, "data.valid") if valid_source is not None else None
    labels = _labels(loaded)
    if loaded.adapter.trains_base and loaded.base.dtype not in ("auto", "float32", "float64"):
        raise RecipeError(
            f"base.dtype is {loaded.base.dtype}, and method 'full' trains the base's own weights: small updates "
            "would be rounded away. Use base.dtype=float32."
        )
    pool.start()
    with locked(folder):
        yield from _train(loaded, folder, rows, valid, labels, list(parents), allow_other_machine, say, stop)


def _rows(source: Rows | None, what: str) -> list[Row]:
    if source is None:
        raise RecipeError(f"{what} is missing: name a file of rows, or pass rows in memory.")
    return read_rows(source)


def _with_labels(recipe: Recipe) -> Recipe:
    """The recipe with the labels themselves in the place of a file of them."""
    found = given_labels(recipe.data)
    if found is None:
        return recipe
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"labels": tuple(found)})})


def _labels(recipe: Recipe) -> list[str] | None:
    return read_labels(recipe.eval.labels) if recipe.eval.labels else None


def _train(
    recipe: Recipe,
    out: Path,
    rows: list[Row],
    valid: list[Row] | None,
    labels: list[str] | None,
    parents: list[str],
    allow_other_machine: bool,
    say: Callable[[str], None] | None,
    stop: Callable[[], bool] | None,
) -> Iterator[Event]:
    asked, plan = recipe, None
    if recipe.budget is not None:
        recipe, plan = _within_budget(recipe, out, rows, valid)
    automatic = recipe.base.dtype == "auto"
    dtype = best_dtype(recipe.adapter.trains_base, recipe.base.device) if automatic else recipe.base.dtype
    model = _base(recipe, dtype, say)
    release_free_memory()
    identity = {
        "recipe": recipe.plain(),
        "data": data_hash(rows),
        "valid": data_hash(valid) if valid is not None else None,
        "labels": labels,
        "template": "chat" if any(r.messages for r in rows) else recipe.data.template,  # of what was learned
        "base": None if model.fingerprint is None else model.fingerprint.model_dump(),
        "dtype": dtype,
        "versions": versions(),
        "machine": machine(),
        **({"parents": parents} if parents else {}),
    }
    was_there = find_run(out, identity, allow_other_machine)
    if was_there and (finished := out / "done.json").exists():
        yield _done_before(out, finished, "model" if recipe.adapter.trains_base else "adapter")
        return
    calibration = _calibration(model, recipe, rows) if recipe.adapter.calibrates else ()
    model.attach(recipe.adapter, seed=recipe.train.seed, calibration=calibration)
    encoded = encode_all(rows, model.tokenizer, recipe.data, model.task)
    refuse_beyond(model.net, encoded.examples, model.n_before)
    evaluate = _evaluation(model, recipe, valid, labels)
    loop = Loop(model, encoded.examples, recipe, evaluate, out)
    begin_run(out, identity)  # only now: a folder is not taken by a recipe that cannot run
    if plan is not None and recipe.budget is not None:
        keep_choice(out, asked, recipe, plan)
        yield planned_event(recipe.budget.memory_gb, plan)
    keep_bytes = _go_on(loop, out) if was_there else 0
    board = [TensorBoard(out / "tensorboard", loop.progress.step)] if recipe.train.tensorboard else []
    sinks: list[Any] = [metrics := MetricsFile(out / "metrics.jsonl", keep_bytes), *board]
    try:
        for event in _events(loop, encoded, identity, out, metrics, stop):
            if not isinstance(event, Saved):
                for sink in sinks:
                    sink.write(event)
            yield event
    finally:
        for sink in sinks:
            sink.close()


def _go_on(loop: Loop, out: Path) -> int:
    """Put the loop where the newest checkpoint was; how many bytes of the metrics belong to it."""
    if (found := newest_checkpoint(out)) is None:
        return 0
    tensors, state = found
    keep_bytes = int(state.pop("metrics_bytes"))
    try:
        loop.restore(tensors, state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise RunError(
            f"The newest folder in {out / 'checkpoints'} is no checkpoint of this run: {error}. Remove it to go on "
            "from the one before."
        ) from None
    return keep_bytes


def _base(recipe: Recipe, dtype: str, say: Callable[[str], None] | None) -> Model:
    b, labels, seed = recipe.base, given_labels(recipe.data), recipe.train.seed
    how: dict[str, Any] = {"block": b.block, "double_quant": b.double_quant, "labels": labels, "seed": seed}
    return load_base(b.path, b.format, dtype, say, device=b.device, **how)


def _calibration(model: Model, recipe: Recipe, rows: list[Row]) -> list[Batch]:
    """The first steps' worth of rows, for a method that starts from what its places read."""
    encoded = encode_all(rows, model.tokenizer, recipe.data, model.task).examples
    refuse_beyond(model.net, encoded)
    most, tokens = CALIBRATION_TOKENS, 0
    for n, example in enumerate(encoded, 1):
        tokens += len(example.input_ids)
        if tokens >= most:
            encoded = encoded[:n]
            break
    lengths = [len(e.input_ids) for e in encoded]
    return [collate([encoded[i] for i in part]) for part in split_micro(range(len(encoded)), lengths, 2048)]


def _done_before(out: Path, finished: Path, what: str) -> Done:
    """The last event of a run that is complete. Raises RunError when its result is gone."""
    if not (result := out / what).is_dir():
        raise RunError(f"{out} says that its run is done, but {result} is gone. Remove {finished} to make it again.")
    try:
        return Done(**json.loads(finished.read_text()))
    except (ValueError, TypeError) as error:
        raise RunError(f"{finished} is damaged: {error}. Remove it: the run then ends again.") from None


def _within_budget(recipe: Recipe, out: Path, rows: list[Row], valid: list[Row] | None) -> tuple[Recipe, Plan | None]:
    """The recipe with what its budget asks for chosen, and the plan; no plan where the run in `out` chose before."""
    assert recipe.budget is not None
    if (before := chosen_before(out, recipe)) is not None:
        return before, None
    tokenizer, task = load_tokenizer(recipe.base.path), task_before(recipe.base.path, given_labels(recipe.data))
    examples = encode_all(rows, tokenizer, recipe.data, task).examples
    validated = encode_all(valid, tokenizer, recipe.data, task).examples if valid else []
    return fit(Planner(recipe, work_of(recipe, examples, validated)), recipe.budget.memory_gb)


def _evaluation(model: Model, recipe: Recipe, valid: list[Row] | None, labels: list[str] | None) -> Evaluate | None:
    """What an evaluation computes: (value of the metric, loss)."""
    spec = recipe.eval
    if valid is None:
        if spec.every_steps or spec.patience or spec.metric != "loss":
            raise RecipeError("eval: data.valid is missing, so there is nothing to evaluate on.")
        return None
    loss_of = find_loss(recipe.train.loss)
    examples = encode_all(valid, model.tokenizer, recipe.data, model.task).examples
    refuse_beyond(model.net, examples, model.n_before)
    rows = valid[: spec.limit] if spec.limit else valid
    if spec.metric != "loss":
        check_rows(rows, spec.metric, labels, model.task)

    def evaluate() -> tuple[float, float | None]:
        loss = mean_loss(model, examples, loss_of)
        if spec.metric == "loss":
            return loss, loss
        result = evaluate_rows(model, rows, spec.metric, recipe.data, labels=labels, max_new_tokens=spec.max_new_tokens)
        return result["value"], loss

    return evaluate


def _events(
    loop: Loop,
    encoded: Encoded,
    identity: dict[str, Any],
    out: Path,
    metrics: MetricsFile,
    stop: Callable[[], bool] | None,
) -> Iterator[Event]:
    progress, recipe = loop.progress, loop.recipe
    model = loop.model
    yield Start(
        n_steps=loop.schedule.n_steps,
        first_step=progress.step,
        rows=encoded.n_rows,
        rows_cut=encoded.n_cut,
        rows_skipped=encoded.n_skipped,
        tokens_per_epoch=encoded.n_tokens,
        target_tokens_per_epoch=encoded.n_targets,
        parameters=sum(t.numel() for t in loop.parameters.values()),
        base=recipe.base.path if model.fingerprint is None else model.fingerprint.short(),
        dtype=identity["dtype"],
        out=str(out),
        blocks="fused" if (why := model.why_plain()) is None else f"plain: {why}",
    )
    saved_at = time.perf_counter()
    for event in loop.run():
        yield event
        is_best = isinstance(event, Eval) and event.is_best
        if is_best and recipe.eval.keep == "best":
            _save_result(loop, identity, out)
        settled = isinstance(event, Eval) or not loop.eval_due()  # never between a step and its evaluation
        ends = settled and stop is not None and stop() and not loop.finished
        if is_best or ends or (settled and time.perf_counter() - saved_at >= recipe.train.save_every_s):
            state = asdict(progress) | {"metrics_bytes": metrics.position()}
            yield Saved(progress.step, str(save_checkpoint(out, progress.step, loop.state(), state)))
            saved_at = time.perf_counter()
        if ends:
            return
    loop.refuse_broken()
    if recipe.eval.keep == "last" or progress.best is None:
        _save_result(loop, identity, out)
    elif not recipe.adapter.trains_base:
        write_adapter(model.adapter(**_provenance(loop, identity)), out / "last", model.tokenizer)
    done = _done(loop, out)
    write_text(out / "done.json", json.dumps(asdict(done)))
    yield done


def _provenance(loop: Loop, identity: dict[str, Any]) -> dict[str, Any]:
    p = loop.progress
    path = loop.recipe.base.path
    is_hub_id = "/" in path and not Path(path).exists()
    return {
        "base": path,
        **({"base_model_name_or_path": path} if is_hub_id else {}),
        "template": identity["template"],
        "recipe": identity["recipe"],
        "data_hash": identity["data"],
        "dtype": identity["dtype"],
        "seed": loop.recipe.train.seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **({"parents": identity["parents"]} if "parents" in identity else {}),
        "versions": identity["versions"],
        "machine": identity["machine"],
        "metrics": {"step": p.step, "train_loss": p.loss, f"valid_{loop.recipe.eval.metric}": p.best},
        "tokens": p.tokens,
        "target_tokens": p.target_tokens,
    }


def _save_result(loop: Loop, identity: dict[str, Any], out: Path) -> None:
    """The present state as RUN/adapter, or as a whole model in RUN/model for full fine-tuning."""
    model = loop.model
    if not loop.recipe.adapter.trains_base:
        write_adapter(model.adapter(**_provenance(loop, identity)), out / "adapter", model.tokenizer)
        return
    with quiet(), space_explained("the model", out), whole_folder(out / "model") as aside:
        model.net.save_pretrained(aside)
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(aside)


def _done(loop: Loop, out: Path) -> Done:
    p = loop.progress
    full = loop.recipe.adapter.trains_base
    return Done(
        adapter=None if full else str(out / "adapter"),
        model=str(out / "model") if full else None,
        seconds=round(p.loop_s, 3),
        target_tokens=p.target_tokens,
        tokens=p.tokens,
        tokens_per_s=round(p.tokens / p.loop_s, 1) if p.loop_s else 0.0,
        peak_rss_mb=peak_rss_mb(),
        steps=p.step,
        loss=p.loss,
        best=p.best,
        metric=loop.recipe.eval.metric,
        stopped_early=p.stopped_early,
    )
