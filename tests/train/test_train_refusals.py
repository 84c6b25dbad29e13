"""A run that cannot begin, or cannot go on: one error, and nothing that was there is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ROWS, VALID, events_in, recipe, run

import deltaw
from deltaw import Lora
from deltaw.data.template import Example
from deltaw.errors import DataError, DeltawError, RecipeError, RunError, TargetError, WorkFailed
from deltaw.model.generate import generate
from deltaw.model.limits import refuse_beyond
from deltaw.model.model import Model
from deltaw.train.events import Done, Saved, Step
from models import VOCAB, make_net, make_tokenizer

# Bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "rows", "valid", "error", "said"),
    [
        ({}, [], None, DataError, "empty"),
        ({}, [{"prompt": "a"}], None, DataError, "rows line 1: field 'completion' is missing"),
        ({}, [{"text": "a", "prompt": "b", "completion": "c"}], None, DataError, "more than one shape"),
        ({"data": {"max_tokens": 5, "too_long": "skip"}}, ROWS, None, DataError, "no row of rows is left"),
        ({"data": {"max_tokens": 5, "too_long": "error"}}, ROWS, None, DataError, "max_tokens is 5"),
        ({"data": {"max_tokens": 2}}, ROWS, None, DataError, "no token of this row is a target"),
        ({}, ROWS, [], DataError, "empty"),
        ({"eval": {"metric": "exact"}}, ROWS, None, RecipeError, "data.valid is missing"),
        ({"eval": {"every_steps": 3}}, ROWS, None, RecipeError, "data.valid is missing"),
        ({"eval": {"metric": "exact"}}, ROWS, [{"text": "no answer"}], DataError, "rows line 1"),
        ({"adapter": {"targets": ["q_porj"]}}, ROWS, None, TargetError, "q_proj"),
        ({"train": {"loss": "stf"}}, ROWS, None, RecipeError, "unknown loss 'stf'. Did you mean 'sft'"),
        ({"eval": {"metric": "choice", "labels": "absent.json"}}, ROWS, VALID, DataError, "absent.json"),
        (
            {"eval": {"metric": "choice", "labels": "LABELS"}},
            ROWS,
            [{"prompt": "a", "completion": "perhaps"}],
            DataError,
            "none of the labels",
        ),
    ],
)
def test_bad_input_is_one_error_and_does_not_take_the_folder(
    base: Path, tmp_path: Path, sections: dict, rows, valid, error: type[DeltawError], said: str
) -> None:
    (tmp_path / "labels.json").write_text('["yes", "no"]')
    if sections.get("eval", {}).get("labels") == "LABELS":
        sections = {"eval": {**sections["eval"], "labels": str(tmp_path / "labels.json")}}
    with pytest.raises(error, match=said) as caught:
        run(recipe(base, **sections), tmp_path / "run", rows, valid)
    assert caught.value.exit_code == 2
    # the same folder takes the corrected recipe
    assert isinstance(run(recipe(base, train={"steps": 1}), tmp_path / "run")[-1], Done)


def test_missing_rows_are_named(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data.train is missing"):
        list(deltaw.train(recipe(base), tmp_path / "run"))
    with pytest.raises(DataError, match=r"absent.jsonl"):
        list(deltaw.train(recipe(base, data={"train": str(tmp_path / "absent.jsonl")}), tmp_path / "run"))


def test_a_folder_of_something_else_or_a_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "letter.txt").write_text("dear")
    with pytest.raises(RunError, match=r"not a run \(letter.txt\)"):
        run(recipe(base), tmp_path / "notes")
    with pytest.raises(RunError, match=r"letter.txt"):
        run(recipe(base), tmp_path / "notes" / "letter.txt")
    assert (tmp_path / "notes" / "letter.txt").read_text() == "dear"


def test_a_broken_run_file_is_named(base: Path, tmp_path: Path) -> None:
    run(recipe(base, train={"steps": 1}), tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text('{"recipe": {')
    with pytest.raises(RunError, match=r"run.json is damaged"):
        run(recipe(base, train={"steps": 1}), tmp_path / "run")


# A full disk ----------------------------------------------------------------------------------------


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


def full_disk_of_safetensors(*_: Any, **__: Any) -> None:
    from safetensors import SafetensorError

    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("deltaw.train.checkpoint.save_file", full_disk_of_safetensors),
        ("deltaw.store.peft.save_file", full_disk_of_safetensors),
        ("deltaw.store.files.os.fsync", full_disk),
        ("deltaw.store.files.os.replace", full_disk),
        ("deltaw.train.sinks.os.fsync", full_disk),
    ],
)
def test_a_full_disk_is_one_sentence_and_earlier_checkpoints_stay(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, how: Any
) -> None:
    plain = recipe(base, train={"save_every_s": 0}, eval={"every_steps": 3})
    whole = run(plain, tmp_path / "whole", valid=VALID)
    with pytest.raises(WorkFailed, match="No space left while writing") as caught:  # noqa: PT012
        for event in deltaw.train(plain, tmp_path / "run", train_rows=ROWS, valid_rows=VALID):
            if isinstance(event, Saved) and event.step == 2:
                monkeypatch.setattr(where, how)
    monkeypatch.undo()
    assert str(tmp_path / "run") in str(caught.value)
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value)
    again = run(plain, tmp_path / "run", valid=VALID)
    assert again[0].first_step >= 2
    wanted = {e.step: e.loss for e in whole if isinstance(e, Step)}
    assert {s["step"]: s["loss"] for s in events_in(tmp_path / "run", "step")} == wanted
    left = [p.name for p in (tmp_path / "run").rglob(".*") if p.name != ".lock"]
    assert left == []


def test_a_full_disk_under_metrics_jsonl_is_one_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes no byte: writing, and closing what could not be written, both fail there."""
    import builtins

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    real = builtins.open

    class Full:
        def __init__(self) -> None:
            self.file = real("/dev/full", "ab")

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def truncate(self, size: int) -> None: ...

    monkeypatch.setattr("deltaw.train.sinks.open", lambda path, mode: Full(), raising=False)
    with pytest.raises(WorkFailed, match=r"No space left while writing metrics.jsonl"):
        run(recipe(base), tmp_path / "run")


def test_a_token_without_a_vector_is_refused_where_it_stands_and_learned_as_a_new_one() -> None:
    """A tokenizer that knows more than the base's embedding holds, as where tokens were added and none resized it."""
    row = Example((1, VOCAB + 1), (False, True), "row 7")
    model = Model(make_net("llama"), make_tokenizer())
    model.tokenizer.add_tokens(["<a>", "<b>"])
    for refused in (lambda: refuse_beyond(model.net, [row]), lambda: generate(model, [[1], [VOCAB + 1]], 4)):
        with pytest.raises(DataError, match=rf"(row 7|Prompt 2): token {VOCAB + 1} is not among the {VOCAB} of this"):
            refused()
    model.attach(Lora(rank=2, new_tokens=("<b>",)))
    refuse_beyond(model.net, [row])
    assert len(generate(model, [[1, VOCAB + 1]], 1)[0]) <= 1
    with pytest.raises(DataError, match=f"token {VOCAB} is not"):
        refuse_beyond(model.net, [Example((1, VOCAB), (False, True), "row 8")])


def test_a_row_longer_than_learned_positions_is_refused_with_both_numbers() -> None:
    limit = 64  # of the tiny models
    fits, too_long = (Example((1,) * n, (False,) + (True,) * (n - 1), f"row {n}") for n in (limit, limit + 1))
    for kind in ("gpt2", "opt"):
        model = Model(make_net(kind))
        refuse_beyond(model.net, [fits])
        with pytest.raises(DataError, match=f"row {limit + 1}: {limit + 1} tokens, and this base has {limit} pos"):
            refuse_beyond(model.net, [too_long])
        with pytest.raises(DataError, match="nothing is left for an answer"):
            generate(model, [[1] * limit], 4)
        # the long prompt leaves two positions; the short one beside it keeps its nine tokens
        answers = generate(model, [[1] * (limit - 2), [1, 3]], 9)
        assert len(answers[0]) <= 2
        assert answers[1] == generate(model, [[1, 3]], 9)[0]
    rotary = Model(make_net("llama"))
    refuse_beyond(rotary.net, [too_long])
    assert len(generate(rotary, [[1] * limit], 2)[0]) <= 2
