"""`deltaw train` and `deltaw data show`: exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ended import Call, refused
from safetensors.torch import load_file, save_file

from deltaw.train.recipe import load_recipe
from deltaw.train.run import train
from train.tiny_runs import ROWS, write_rows


def test_json_prints_one_event_a_line_and_nothing_else(deltaw: Call, written: Path, tmp_path: Path) -> None:
    ended = deltaw("train", written, "train.steps=3", "--out", tmp_path / "run", "--json")
    assert ended.code == 0
    kinds = [e["event"] for e in ended.events]
    assert kinds[0] == "start"
    assert kinds.count("step") == 3
    done = ended.events[-1]
    assert done["event"] == "done"
    assert done.keys() >= {"adapter", "seconds", "target_tokens", "tokens", "tokens_per_s", "peak_rss_mb"}
    assert done["adapter"] == str(tmp_path / "run" / "adapter")
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    wanted = list(train(written, tmp_path / "library", overrides=["train.steps=3"]))
    losses = [e["loss"] for e in ended.events if e["event"] == "step"]
    assert losses == [e.loss for e in wanted if e.kind == "step"]


def test_the_same_command_again_is_done_at_once(deltaw: Call, written: Path, tmp_path: Path) -> None:
    command = ("train", written, "train.steps=2", "--out", tmp_path / "run", "--json")
    first, second = deltaw(*command), deltaw(*command)
    assert second.code == 0
    assert second.events == [first.events[-1]]


def test_a_person_sees_rows_evaluations_and_where_it_is_saved(deltaw: Call, written: Path, tmp_path: Path) -> None:
    ended = deltaw("train", written, "--out", tmp_path / "run")
    assert ended.code == 0
    text = " ".join((ended.out + ended.err).split())
    assert "11 rows (0 cut, 0 skipped)" in text
    assert "valid loss" in text
    assert "(best)" in text
    assert "done: 6 steps" in text
    assert str(tmp_path / "run" / "adapter") in "".join(text.split()), "where the width of a terminal breaks it"
    again = deltaw("train", written, "--out", tmp_path / "run")
    assert again.code == 0
    assert "done: 6 steps" in " ".join((again.out + again.err).split())


def test_a_run_goes_to_a_folder_named_after_its_recipe(
    deltaw: Call, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = deltaw("train", "recipe.yaml", "train.steps=1", "--json")
    assert ended.code == 0
    assert (tmp_path / "runs" / "recipe" / "run.json").is_file()


@pytest.mark.parametrize("as_json", [[], ["--json"]])
@pytest.mark.parametrize(
    ("overrides", "kind", "said"),
    [
        (["adapter.rank=0"], "RecipeError", "Lora.rank: must be at least 1"),
        (["adapter.rank=16000000"], "SpecError", "parameters alone would take"),
        (["adapter.rank=99999999999999999999999"], "RecipeError", "Lora.rank: must be at most 16,777,216"),
        (["adapter.rank_pattern={q_proj: 99999999999999999999}"], "RecipeError", "holds a rank that is not from 1 to"),
        (["adapter.layers=3-1"], "RecipeError", "ends before it begins; write '1-3'"),
        (["adapter.alpha=.nan"], "RecipeError", "Lora.alpha: must be a finite number"),
        (["train.lrr=1"], "RecipeError", "unknown key 'train.lrr'. Did you mean 'lr'"),
        (["adapter.targets=[q_porj]"], "TargetError", "q_proj"),
        (["base.path=no-such-folder"], "BaseError", "no-such-folder"),
        (["data.train=absent.jsonl"], "DataError", "absent.jsonl"),
        (["data.max_tokens=3", "data.too_long=skip"], "DataError", "longer than max_tokens 3"),
        (["budget.memory_gb=0.01"], "BudgetError", "smallest budget"),
        (["eval.metric=choice", "eval.labels=absent.json"], "DataError", "absent.json"),
        (["nonsense"], "RecipeError", "key=value"),
    ],
)
def test_bad_input_is_exit_2_and_one_message_on_stderr(
    deltaw: Call, written: Path, tmp_path: Path, as_json: list[str], overrides: list[str], kind: str, said: str
) -> None:
    refused(deltaw("train", written, *overrides, "--out", tmp_path / "run", *as_json), kind, said)
    assert not (tmp_path / "run" / "run.json").exists()


def test_bad_json_is_named_by_file_and_line(deltaw: Call, written: Path, tmp_path: Path) -> None:
    lines = [json.dumps(ROWS[i % len(ROWS)]) for i in range(500)]
    lines[411] = '{"prompt": "a", "completion": "b"'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    ended = deltaw("train", written, "--out", tmp_path / "run", "--json")
    refused(ended, "DataError", f"{tmp_path / 'rows.jsonl'} line 412: bad JSON")


@pytest.mark.parametrize(
    ("line", "said"),
    [("", "has no rows"), ('{"prompt": "a"}', "line 1: field 'completion' is missing"), ("[1]", "line 1: a row must")],
)
def test_a_bad_file_of_rows_is_named(deltaw: Call, written: Path, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text(line)
    refused(deltaw("train", written, "--out", tmp_path / "run"), "DataError", "rows.jsonl", said)


def test_a_missing_recipe_and_a_bad_one_are_named(deltaw: Call, tmp_path: Path) -> None:
    refused(deltaw("train", tmp_path / "absent.yaml"), "RecipeError", "absent.yaml")
    (tmp_path / "bad.yaml").write_text("base: [")
    refused(deltaw("train", tmp_path / "bad.yaml"), "RecipeError", "bad.yaml is not YAML")


def test_an_output_folder_with_another_run_is_exit_2(deltaw: Call, written: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert deltaw("train", written, "train.steps=1", "--out", out, "--json").code == 0
    refused(deltaw("train", written, "train.steps=2", "--out", out, "--json"), "RunError", "train.steps is 1")
    (tmp_path / "file").write_text("x")
    refused(deltaw("train", written, "--out", tmp_path / "file"), "RunError", "file")


def test_a_run_that_cannot_begin_leaves_its_folder_as_it_was(deltaw: Call, written: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "me.txt").write_text("x")
    refused(deltaw("train", written, "--out", mine), "RunError", "holds something that is not a run (me.txt)")
    assert [p.name for p in mine.iterdir()] == ["me.txt"]
    refused(deltaw("train", written, "adapter.targets=[absent]", "--out", tmp_path / "new"), "TargetError", "absent")
    assert not (tmp_path / "new").exists()
    (mine / "me.txt").unlink()
    refused(deltaw("train", written, "adapter.targets=[absent]", "--out", mine), "TargetError", "absent")
    assert list(mine.iterdir()) == []


def _drop_a_tensor(run: Path) -> None:
    path = sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors"
    tensors = load_file(path)
    del tensors[min(name for name in tensors if name.startswith("p|"))]
    save_file(tensors, path)


def _shorten_tensors(run: Path) -> None:
    path = sorted((run / "checkpoints").iterdir())[-1] / "state.safetensors"
    save_file({name: t.flatten()[:1].clone() for name, t in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_drop_a_tensor, "is no checkpoint of this run"),
        (_shorten_tensors, "is no checkpoint of this run"),
        (lambda run: (sorted((run / "checkpoints").iterdir())[-1] / "state.json").write_text('{"step": "x"}'), "lacks"),
        (lambda run: (run / "done.json").write_text("[]"), "done.json is damaged"),
        (lambda run: (run / "done.json").write_text("{"), "done.json is damaged"),
    ],
    ids=["a tensor gone", "shapes", "state", "done list", "done"],
)
def test_damage_in_a_run_is_one_sentence(
    deltaw: Call, written: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    out = tmp_path / "run"
    assert deltaw("train", written, "train.steps=2", "train.save_every_s=0", "--out", out).code == 0
    (out / "done.json").unlink()
    damage(out)
    refused(deltaw("train", written, "train.steps=2", "train.save_every_s=0", "--out", out), "RunError", said)


@pytest.mark.parametrize("held", ["[]", "{}", '{"recipe": 5}', '{"recipe": {}}', "nonsense"])
def test_a_damaged_run_is_named(deltaw: Call, written: Path, tmp_path: Path, held: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(held)
    refused(deltaw("train", written, "--out", tmp_path / "run"), "RunError", "run.json is damaged")


def test_work_that_fails_is_exit_1_and_keeps_stdout_json(deltaw: Call, written: Path, tmp_path: Path) -> None:
    ended = deltaw("train", written, "train.lr=1e30", "train.clip=0", "--out", tmp_path / "run", "--json")
    assert ended.code == 1
    assert ended.err.startswith("WorkFailed: Step ")
    assert {e["event"] for e in ended.events} >= {"start", "step"}
    assert "Traceback" not in ended.err


def test_a_full_disk_is_exit_1(deltaw: Call, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("deltaw.store.files.os.fsync", full)
    refused(deltaw("train", written, "--out", tmp_path / "run", "--json"), "WorkFailed", "No space left", code=1)


def test_wrong_usage_is_exit_2(deltaw: Call) -> None:
    for arguments in (("train",), ("train", "a.yaml", "--nonsense"), ("trian",)):
        ended = deltaw(*arguments)
        assert (ended.code, ended.out) == (2, ""), arguments
        assert "Usage:" in ended.err


@pytest.mark.parametrize(
    ("asked", "code", "said", "saves"),
    [
        (signal.SIGINT, 130, "The same command goes on from the last checkpoint", "train.save_every_s=0"),
        (
            signal.SIGTERM,
            143,
            "Stopped, with a checkpoint. The same command goes on from there",
            "train.save_every_s=1000",
        ),
    ],
)
def test_a_signal_says_how_to_go_on_and_the_same_command_does(
    written: Path, tmp_path: Path, cache: Path, asked: signal.Signals, code: int, said: str, saves: str
) -> None:
    """In a process of its own, so that stdout is all of its stdout."""
    settings = ["train.epochs=200", saves, "eval.every_steps=100"]
    program = "import torch; torch.set_num_threads(1); from deltaw.cli.main import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "train",
        str(written),
        *settings,
        "--out",
        str(tmp_path / "run"),
        "--json",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DELTAW_CACHE": str(cache)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in what a shell runs aside
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if len(lines) == 6:
                process.send_signal(asked)
        err = process.stderr.read()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert said in " ".join(err.split())
    assert [json.loads(line)["event"] for line in lines[:2]] == ["start", "step"]
    events = train(load_recipe(written, settings), tmp_path / "run")
    first = next(iter(events)).first_step
    assert first >= 2
    if asked == signal.SIGTERM:
        ended = [json.loads(line) for line in lines]
        assert ended[-1]["event"] == "saved"
        assert ended[-1]["step"] == first == ended[-2]["step"], "the present step is kept"
    events.close()


def test_data_show_marks_targets_and_counts_tokens(deltaw: Call, written: Path) -> None:
    shown = deltaw("data", "show", written, "--limit", 2)
    assert shown.code == 0
    assert "ab ?[[ yes<|end|>]]" in shown.out.replace("]][[", "")
    told = deltaw("data", "show", written, "--json", "--split", "valid").json
    assert len(told["rows"]) == 2
    pieces = told["rows"][0]["pieces"]
    assert "".join(p["text"] for p in pieces if p["target"]).strip() == "yes<|end|>"
    assert "".join(p["text"] for p in pieces if not p["target"]) == "ba ?"


def test_data_show_refuses_what_training_refuses(deltaw: Call, written: Path, tmp_path: Path) -> None:
    refused(deltaw("data", "show", written, "data.train=absent.jsonl"), "DataError", "absent.jsonl")
    refused(deltaw("data", "show", written, "data.maxtokens=3"), "RecipeError", "max_tokens")
    write_rows(tmp_path / "rows.jsonl", [{"text": ""}])
    refused(deltaw("data", "show", written), "DataError", "line 1")
