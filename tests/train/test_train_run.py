"""A whole run: its events, what it leaves in its folder, early stopping, full fine-tuning."""

from __future__ import annotations

import json
import math
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROWS, VALID, adapter_tensors, plain_transformers, recipe, run, write_rows

import deltaw
from deltaw.data.source import data_hash, read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import encode_all
from deltaw.errors import AdapterError, RecipeError
from deltaw.methods import Lora
from deltaw.model.base import load_base
from deltaw.train.evaluate import evaluate_rows
from deltaw.train.events import Done, Eval, Saved, Start, Step
from deltaw.train.loop import Loop
from deltaw.train.loss import sft
from deltaw.train.recipe import load_recipe
from deltaw.train.step import mean_loss

# on validation rows that contradict the training rows the loss first falls (an answer ends), then rises
ALL_NO = [{"prompt": row["prompt"], "completion": "no"} for row in ROWS]
ALL_YES = [{"prompt": row["prompt"], "completion": "yes"} for row in ROWS]
DONE_KEYS = {"event", "adapter", "seconds", "target_tokens", "tokens", "tokens_per_s", "peak_rss_mb"}


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """A run with evaluations every two steps, and its events."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(recipe(base, eval={"every_steps": 2}), out, valid=VALID)


# Events ---------------------------------------------------------------------------------------------


def test_a_run_is_a_start_then_steps_and_evaluations_then_done(finished: tuple[Path, list[Any]]) -> None:
    _, events = finished
    n = events[0].n_steps
    assert isinstance(events[0], Start)
    assert [e.step for e in events if isinstance(e, Step)] == list(range(1, n + 1))
    assert [e.step for e in events if isinstance(e, Eval)] == [s for s in range(1, n + 1) if s % 2 == 0 or s == n]
    assert isinstance(events[-1], Done)
    assert sum(isinstance(e, Done) for e in events) == 1
    for event in events:
        plain = json.loads(json.dumps(event.plain()))
        assert plain["event"] == event.kind
        assert plain.keys() == {"event", *(f.name for f in fields(event))} - {"paged_mb"}  # states are not paged


def test_the_start_counts_rows_and_tokens(finished: tuple[Path, list[Any]], base: Path) -> None:
    start = finished[1][0]
    encoded = encode_all(read_rows(ROWS), load_base(base).tokenizer, DataSpec(max_tokens=64))
    assert (start.rows, start.rows_cut, start.rows_skipped, start.first_step) == (len(ROWS), 0, 0, 0)
    assert (start.tokens_per_epoch, start.target_tokens_per_epoch) == (encoded.n_tokens, encoded.n_targets)
    assert start.parameters == sum(t.numel() for t in adapter_tensors(finished[0] / "adapter").values())


def test_cut_and_skipped_rows_are_counted(base: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "x" * 40}]
    cut = run(recipe(base, data={"max_tokens": 30}, train={"steps": 1}), tmp_path / "a", rows)[0]
    skip = run(recipe(base, data={"max_tokens": 30, "too_long": "skip"}, train={"steps": 1}), tmp_path / "b", rows)
    assert (cut.rows, cut.rows_cut, cut.rows_skipped) == (len(rows), 1, 0)
    assert (skip[0].rows, skip[0].rows_cut, skip[0].rows_skipped) == (len(rows), 0, 1)


def test_done_tells_what_scripts_need(finished: tuple[Path, list[Any]]) -> None:
    out, events = finished
    done = events[-1].plain()
    steps = [e for e in events if isinstance(e, Step)]
    assert done.keys() >= DONE_KEYS
    assert done["adapter"] == str(out / "adapter")
    assert done["tokens"] == sum(s.tokens for s in steps) == 2 * events[0].tokens_per_epoch
    assert done["target_tokens"] == sum(s.target_tokens for s in steps)
    assert done["seconds"] >= sum(s.seconds for s in steps) - 0.01
    assert done["tokens_per_s"] == pytest.approx(done["tokens"] / done["seconds"], rel=0.01)
    assert done["peak_rss_mb"] > 10
    assert (done["steps"], done["stopped_early"], done["metric"]) == (len(steps), False, "loss")
    assert done["best"] == min(e.value for e in events if isinstance(e, Eval))


def test_metrics_jsonl_holds_the_events_but_for_checkpoints(finished: tuple[Path, list[Any]]) -> None:
    out, events = finished
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [e.plain() for e in events if not isinstance(e, Saved)]


def test_an_evaluation_s_value_is_the_mean_loss_on_the_validation_rows(
    finished: tuple[Path, list[Any]], base: Path
) -> None:
    out, events = finished
    model = load_base(base)
    model.attach(out / "last")
    examples = encode_all(read_rows(VALID), model.tokenizer, DataSpec(max_tokens=64)).examples
    last = [e for e in events if isinstance(e, Eval)][-1]
    assert last.value == last.loss == mean_loss(model, examples, sft)


@pytest.mark.parametrize("metric", ["exact", "json", "choice", "perplexity"])
def test_a_task_metric_in_training_is_what_evaluation_gives_afterwards(base: Path, tmp_path: Path, metric: str) -> None:
    rows = [{"prompt": f"{i}", "completion": '"a"' if i % 2 else "{}"} for i in range(6)]
    (tmp_path / "labels.json").write_text(json.dumps(['"a"', "{}"]))
    settings: dict[str, Any] = {"metric": metric, "every_steps": 10, "limit": 4, "keep": "last"}
    if metric == "choice":
        settings["labels"] = str(tmp_path / "labels.json")
    plain = recipe(base, train={"steps": 20, "lr": 5e-3, "tokens_per_step": 20}, eval=settings)
    events = run(plain, tmp_path / "run", rows, rows)
    values = [e for e in events if isinstance(e, Eval)]
    assert [e.step for e in values] == [10, 20]
    assert all(e.metric == metric and e.loss is not None for e in values)
    model = load_base(base)
    model.attach(tmp_path / "run" / "adapter")
    spec, labels = DataSpec(max_tokens=64), ['"a"', "{}"] if metric == "choice" else None
    wanted = evaluate_rows(model, read_rows(rows)[:4], metric, spec, labels=labels)
    assert values[-1].value == wanted["value"]
    better = min if metric == "perplexity" else max
    assert events[-1].best == better(e.value for e in values)


# The folder -----------------------------------------------------------------------------------------


def test_the_adapter_s_folder_has_peft_s_files_and_where_it_came_from(
    finished: tuple[Path, list[Any]], base: Path
) -> None:
    out, events = finished
    assert {p.name for p in (out / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "deltaw.json",
        "README.md",
    }
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 5)
    ours = json.loads((out / "adapter" / "deltaw.json").read_text())
    told = ours["provenance"]
    best = min((e for e in events if isinstance(e, Eval)), key=lambda e: e.value)
    assert told["recipe"] == load_recipe(recipe(base, eval={"every_steps": 2})).plain()
    assert told["data_hash"] == data_hash(read_rows(ROWS))
    assert told["versions"].keys() >= {"deltaw", "torch", "transformers", "python"}
    assert told["seed"] == 0
    assert told["metrics"]["step"] == best.step
    assert told["metrics"]["valid_loss"] == best.value
    assert ours["fingerprint"] == load_base(base).fingerprint.model_dump()
    assert deltaw.load_adapter(out).provenance == told


def test_the_best_is_kept_or_the_last_as_asked(base: Path, tmp_path: Path) -> None:
    settings = {"steps": 30, "lr": 0.02}
    made = {}
    for keep in ("best", "last"):
        plain = recipe(base, train=settings, eval={"every_steps": 3, "keep": keep})
        made[keep] = run(plain, tmp_path / keep, ALL_NO, ALL_YES)
    values = [e for e in made["best"] if isinstance(e, Eval)]
    best = min(values, key=lambda e: e.value)
    assert best.step < 30, "the best must not be the last here"
    assert [e.is_best for e in values] == [
        v.value < min([math.inf, *(w.value for w in values[:i])]) for i, v in enumerate(values)
    ]
    model = load_base(base)
    examples = encode_all(read_rows(ALL_YES), model.tokenizer, DataSpec(max_tokens=64)).examples
    for folder, wanted in (("best/adapter", best), ("best/last", values[-1]), ("last/adapter", values[-1])):
        model.attach(tmp_path / folder)
        assert mean_loss(model, examples, sft) == wanted.value, folder
        model.detach()
    assert not (tmp_path / "last" / "last").exists()


def test_patience_stops_early_and_says_so(base: Path, tmp_path: Path) -> None:
    plain = recipe(base, train={"steps": 60, "lr": 0.02}, eval={"every_steps": 3, "patience": 2})
    events = run(plain, tmp_path / "run", ALL_NO, ALL_YES)
    values = [e for e in events if isinstance(e, Eval)]
    assert [e.is_best for e in values][-3:] == [True, False, False]
    assert events[-1].stopped_early
    assert events[-1].steps == values[-1].step < 60


def test_without_validation_rows_the_last_state_is_the_adapter(base: Path, tmp_path: Path) -> None:
    events = run(recipe(base), tmp_path / "run")
    assert not [e for e in events if isinstance(e, Eval)]
    assert events[-1].best is None
    loaded = load_recipe(recipe(base))
    model = load_base(base)
    model.attach(loaded.adapter)
    loop = Loop(model, encode_all(read_rows(ROWS), model.tokenizer, loaded.data).examples, loaded, None)
    list(loop.run())
    made = deltaw.load_adapter(tmp_path / "run")
    assert made.id == model.adapter().id


def test_a_run_takes_files_and_overrides_and_runs_nothing_before_it_is_asked(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "r.yaml").write_text(
        f"base: {{path: {base}, dtype: float32}}\nadapter: {{method: lora, rank: 3, alpha: 5}}\n"
        "data: {train: rows.jsonl, valid: rows.jsonl}\ntrain: {tokens_per_step: 60}\n"
    )
    events = deltaw.train(tmp_path / "r.yaml", tmp_path / "run", overrides=["train.steps=2"])
    assert not (tmp_path / "run").exists()
    assert list(events)[-1].steps == 2


def test_the_same_seed_gives_the_same_adapter_and_another_one_another(base: Path, tmp_path: Path) -> None:
    ids = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(recipe(base, train={"seed": seed, "steps": 2}, adapter={"dropout": 0.1}), tmp_path / name)
        ids.append(deltaw.load_adapter(tmp_path / name).id)
    assert ids[0] == ids[1] != ids[2]


def test_tensorboard_gets_readable_scalars(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = run(recipe(base, train={"tensorboard": True}), tmp_path / "run", valid=VALID)
    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    steps = [e for e in events if isinstance(e, Step)]
    assert set(read.Tags()["scalars"]) >= {"train/loss", "train/lr", "train/grad_norm", "valid/loss"}
    assert [(s.step, s.value) for s in read.Scalars("train/loss")] == [(e.step, pytest.approx(e.loss)) for e in steps]


class FakeWriter:
    """Stands for tensorboard's writer: keeps what it is told."""

    made: list[FakeWriter]

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.scalars, self.closed = folder, purge_step, [], False
        FakeWriter.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_is_told_steps_and_values_and_to_forget_only_what_comes_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeWriter.made = []
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    plain = recipe(base, train={"tensorboard": True, "save_every_s": 0})
    begun = deltaw.train(plain, tmp_path / "run", train_rows=ROWS, valid_rows=VALID)
    for event in begun:
        if isinstance(event, Saved) and event.step == 2:
            break
    begun.close()
    events = run(plain, tmp_path / "run", valid=VALID)
    first, second = FakeWriter.made
    assert first.closed
    assert second.closed
    # steps 1 and 2 are written already and do not come again; a purge begins at the step it is given
    assert second.purge_step == 3
    again = [e for e in events if isinstance(e, Step)]
    assert [e.step for e in again] == [3, 4, 5, 6]
    assert [s for s in second.scalars if s[0] == "train/loss"] == [("train/loss", e.loss, e.step) for e in again]
    assert {s[0] for s in second.scalars} >= {"train/lr", "train/grad_norm", "train/tokens_per_s", "valid/loss"}


def test_tensorboard_that_is_not_installed_is_an_error_before_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RecipeError, match="tensorboard"):
        run(recipe(base, train={"tensorboard": True}), tmp_path / "run")


# Full fine-tuning -----------------------------------------------------------------------------------


def test_full_trains_every_weight_and_leaves_a_plain_model(base: Path, tmp_path: Path) -> None:
    plain = recipe(base, adapter={"method": "full"}, train={"lr": 1e-3})
    events = run(plain, tmp_path / "run", valid=VALID)
    done = events[-1]
    assert (done.adapter, done.model) == (None, str(tmp_path / "run" / "model"))
    assert events[0].parameters == sum(p.numel() for p in plain_transformers(base).parameters())
    before, after = load_file(base / "model.safetensors"), load_file(Path(done.model) / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], t) for n, t in after.items()), "a weight did not train"
    model = load_base(done.model)
    examples = encode_all(read_rows(VALID), model.tokenizer, DataSpec(max_tokens=64)).examples
    assert mean_loss(model, examples, sft) == pytest.approx(done.best, rel=1e-6)  # now by fused blocks
    ids = torch.tensor([[5, 99, 7, 200]])
    with torch.no_grad():
        assert torch.equal(plain_transformers(Path(done.model), dtype=torch.float32)(ids).logits, model.logits(ids))


def test_a_fully_trained_model_refuses_adapters_and_detach(base: Path) -> None:
    model = load_base(base)
    model.attach(load_recipe(recipe(base, adapter={"method": "full"})).adapter)
    with pytest.raises(AdapterError, match="trains its own weights"):
        model.attach(Lora(rank=3, alpha=5), name="second")
    with pytest.raises(AdapterError, match="has changed the base itself"):
        model.detach()


def test_full_in_bfloat16_is_refused_before_anything_is_made(base: Path, tmp_path: Path) -> None:
    plain = recipe(base, adapter={"method": "full"}, base={"dtype": "bfloat16"})
    with pytest.raises(RecipeError, match="rounded away"):
        run(plain, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    auto = run(recipe(base, adapter={"method": "full"}, base={"dtype": "auto"}, train={"steps": 1}), tmp_path / "a")
    assert auto[0].dtype == "float32"


@pytest.mark.filterwarnings("ignore:.*tokenizer:UserWarning")
def test_an_adapter_with_new_tokens_brings_its_tokenizer_so_that_peft_can_grow_the_base(
    base: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    spec = {"new_tokens": ["<a>", "<b>"]}
    run(recipe(base, train={"steps": 2}, adapter=spec), tmp_path / "run", rows=[{"prompt": "x", "completion": "<a> y"}])
    model = load_base(base)
    model.attach(tmp_path / "run")
    ids = torch.tensor([model.tokenizer("x <a> y<b>")["input_ids"]])
    assert int(ids.max()) >= model.places.weights["model.embed_tokens"].in_features
    peers = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run" / "adapter").eval()
    with torch.no_grad():
        ours, theirs = model.logits(ids), peers(ids).logits
    known = theirs.shape[-1]
    torch.testing.assert_close(
        ours[..., :known], theirs[..., : ours.shape[-1]], rtol=0, atol=1e-4
    )  # logits of order 10
    run(recipe(base, train={"steps": 2}, adapter=spec), tmp_path / "run", rows=[{"prompt": "x", "completion": "<a> y"}])
