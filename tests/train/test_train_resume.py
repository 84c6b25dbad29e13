"""Exact resume: kill -9 at any moment, the same call again, the same numbers bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import ROWS, VALID, events_in, recipe, run, save_base, write_rows

import deltaw
from deltaw.errors import DataError, RunError
from deltaw.train.checkpoint import versions
from deltaw.train.events import Done, Eval, Saved, Step

SAME = ("step", "epoch", "loss", "lr", "grad_norm", "tokens", "target_tokens")
MORE_VALID = [*VALID, {"prompt": "xx ooo?", "completion": "maybe"}]

# each with the moments at which it is killed, one after the other, going on in between
KILLED: dict[str, tuple[dict[str, Any], list[dict] | None, list[str]]] = {
    "dropout, best, patience": (
        {
            "adapter": {"dropout": 0.3},
            "train": {"epochs": 4, "optimizer": {"lora_plus_ratio": 4.0, "weight_decay": 0.1}},
            "eval": {"every_steps": 2, "keep": "best", "patience": 3},
        },
        MORE_VALID,
        ["text:1", "event:1", "event:2", "checkpoint:1", "adapter:1", "event:4", "state:2", "kept:1", "swap:1",
         "event:7", "checkpoint:3", "adapter:1", "swap:1", "text:1"],
    ),
    "last, task metric, micro-batches, recomputation": (
        {
            "adapter": {"bias": "all", "dropout": 0.1},
            "train": {"epochs": 3, "micro_tokens": 25, "checkpointing": True, "schedule": "linear"},
            "eval": {"keep": "last", "metric": "exact", "every_steps": 3},
        },
        MORE_VALID,
        ["event:3", "state:1", "checkpoint:2", "kept:2", "event:6", "adapter:1", "text:1"],
    ),
    "no validation rows": ({}, None, ["event:2", "checkpoint:2", "state:1", "event:5", "adapter:1", "text:1"]),
    "full": (
        {"adapter": {"method": "full"}, "train": {"lr": 1e-3}, "eval": {"every_steps": 2}},
        MORE_VALID,
        ["event:3", "checkpoint:1", "state:2", "kept:2", "event:4", "text:1"],
    ),
}  # fmt: skip


def result(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run leaves for its user."""
    files = [p for p in out.rglob("*.safetensors") if "checkpoints" not in p.parts]
    return {f"{p.relative_to(out)}:{n}": t for p in files for n, t in load_file(p).items()}


def assert_same_run(out: Path, whole: Path) -> None:
    for kind, keys in (("step", SAME), ("eval", ("step", "metric", "value", "loss", "is_best"))):
        found = [[e[k] for k in keys] for e in events_in(out, kind)]
        assert found == [[e[k] for k in keys] for e in events_in(whole, kind)], kind
    steps = [e["step"] for e in events_in(out, "step")]
    assert steps == list(range(1, len(steps) + 1)), "each step is there once"
    mine, wanted = result(out), result(whole)
    assert mine.keys() == wanted.keys() != set()
    for name, tensor in wanted.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
@pytest.mark.parametrize("case", KILLED)
def test_a_run_killed_at_many_moments_ends_bit_equal_to_one_never_stopped(
    base: Path, tmp_path: Path, cache: Path, case: str
) -> None:
    sections, valid, kills = KILLED[case]
    sections = {**sections, "train": {"save_every_s": 0, **sections.get("train", {})}}
    plain = recipe(base, **sections)
    run(plain, tmp_path / "whole", valid=valid)
    plan = {"recipe": plain, "out": str(tmp_path / "out"), "cache": str(cache), "rows": ROWS, "valid": valid}
    program = Path(__file__).with_name("killed_runs.py")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), json.dumps({**plan, "kills": kills})],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * len(kills) + [0], ended.stderr
    assert_same_run(tmp_path / "out", tmp_path / "whole")
    starts = [e["first_step"] for e in events_in(tmp_path / "out", "start")]
    assert starts == sorted(starts)
    assert starts[-1] > 0
    left = {p.name for p in (tmp_path / "out").rglob(".*")}
    assert left <= {".lock"}, "half-written folders are cleared away"
    assert len(list((tmp_path / "out" / "checkpoints").iterdir())) <= 2


@pytest.mark.slow  # imports torch in two processes
def test_a_run_from_the_program_killed_from_outside_goes_on_too(base: Path, tmp_path: Path, cache: Path) -> None:
    """The whole way: python -c in a process of its own, SIGKILL by another, the same line again."""
    plain = recipe(base, train={"epochs": 40, "save_every_s": 0}, adapter={"dropout": 0.2}, eval={"keep": "last"})
    run(plain, tmp_path / "whole")
    code = (
        "import sys, json, pathlib, torch; torch.set_num_threads(1)\n"
        "import deltaw\nfrom deltaw.core.fingerprint import set_cache_dir\n"
        "set_cache_dir(pathlib.Path(sys.argv[3]))\n"
        "for e in deltaw.train(json.loads(sys.argv[1]), sys.argv[2], train_rows=json.loads(sys.argv[4])):\n"
        "    print(json.dumps(e.plain()), flush=True)\n"
    )
    arguments = [json.dumps(plain), str(tmp_path / "out"), str(cache), json.dumps(ROWS)]
    command = [sys.executable, "-W", "ignore", "-c", code, *arguments]
    for n_events in (9, None):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for number, _ in enumerate(process.stdout, start=1):
                if number == n_events:
                    process.kill()
                    break
            process.stdout.read()
        assert process.returncode == (0 if n_events is None else -signal.SIGKILL)
    assert events_in(tmp_path / "out", "start")[-1]["first_step"] >= 3
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def stopped_after(step: int, plain: dict[str, Any], out: Path, **rows: Any) -> None:
    """Leave a run in the middle, in this process."""
    events = deltaw.train(plain, out, train_rows=ROWS, **rows)
    with contextlib.closing(events):
        for event in events:
            if isinstance(event, Saved) and event.step == step:
                return
    raise AssertionError(f"no checkpoint at step {step}")


def often(folder: Path, **sections: dict) -> dict[str, Any]:
    return recipe(folder, **{**sections, "train": {"save_every_s": 0, **sections.get("train", {})}})


def test_a_finished_run_is_done_at_once_and_changes_nothing(base: Path, tmp_path: Path) -> None:
    first = run(often(base), tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = run(often(base), tmp_path / "run")
    assert again == [first[-1]]
    assert isinstance(again[0], Done)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_early_stopping_is_remembered(base: Path, tmp_path: Path) -> None:
    # learning "no" by heart makes "yes" unlikelier after a few steps
    no, yes = ([{"prompt": row["prompt"], "completion": answer} for row in ROWS] for answer in ("no", "yes"))
    plain = often(base, train={"lr": 0.02, "steps": 60}, eval={"every_steps": 3, "patience": 2})
    whole = run(plain, tmp_path / "whole", no, yes)
    assert whole[-1].stopped_early
    stopped = deltaw.train(plain, tmp_path / "run", train_rows=no, valid_rows=yes)
    with contextlib.closing(stopped):
        for event in stopped:
            if isinstance(event, Saved) and event.step == whole[-1].steps:
                break
    again = run(plain, tmp_path / "run", no, yes)
    assert not [e for e in again if isinstance(e, Step | Eval)]
    assert again[-1].stopped_early
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_time_counts_over_all_processes(base: Path, tmp_path: Path) -> None:
    stopped_after(3, often(base), tmp_path / "run")
    spent = json.loads((tmp_path / "run" / "checkpoints" / "00000003" / "state.json").read_text())["loop_s"]
    done = run(often(base), tmp_path / "run")[-1]
    assert done.seconds > spent > 0
    assert done.tokens == 242


# What is another run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "change", "said"),
    [
        ("train", {"lr": 0.02}, "recipe.train.lr is 0.01, this one's is 0.02"),
        ("train", {"seed": 1}, "recipe.train.seed is 0, this one's is 1"),
        ("adapter", {"rank": 2}, "recipe.adapter.rank is 3, this one's is 2"),
        ("data", {"separator": "\n"}, "recipe.data.separator"),
        ("base", {"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_by_what_differs(
    base: Path, tmp_path: Path, section: str, change: dict, said: str
) -> None:
    stopped_after(1, often(base), tmp_path / "run")
    with pytest.raises(RunError, match="holds another run") as caught:
        run(often(base, **{section: change}), tmp_path / "run")
    assert said in str(caught.value)
    assert str(tmp_path / "run") in str(caught.value)
    assert run(often(base), tmp_path / "run")[0].first_step == 1  # and nothing was lost


def test_other_rows_labels_or_another_base_are_another_run(base: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('["yes", "no"]')
    plain = often(base, eval={"metric": "choice", "labels": str(labels)})
    stopped_after(1, plain, tmp_path / "run", valid_rows=VALID)
    with pytest.raises(RunError, match="its data is '"):
        run(plain, tmp_path / "run", [*ROWS[1:], ROWS[0]], VALID)
    with pytest.raises(RunError, match="its valid is '"):
        run(plain, tmp_path / "run", ROWS, VALID[:1])
    labels.write_text('["yes", "no", "maybe"]')
    with pytest.raises(RunError, match="its labels is "):
        run(plain, tmp_path / "run", ROWS, VALID)
    labels.write_text('["yes", "no"]')
    other = recipe(save_base(tmp_path / "tiny", seed=1), train={"save_every_s": 0}, eval=plain["eval"])
    with pytest.raises(
        RunError, match=r"another base:\n  weights: the run has \w{12}, this model has \w{12}\n  Choose"
    ):
        run(other, tmp_path / "run", ROWS, VALID)


def test_the_same_files_by_other_paths_are_the_same_run(base: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_rows(tmp_path / "one" / "rows.jsonl", ROWS)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two"):
        plain = often(base, data={"train": str(tmp_path / name / "rows.jsonl")})
        if name == "two":
            plain["base"]["path"] = str(shutil.copytree(base, tmp_path / "another name"))
        with contextlib.closing(deltaw.train(plain, tmp_path / "run")) as events:
            start = next(iter(events))
            assert start.first_step == (0 if name == "one" else 2)
            assert any(isinstance(e, Saved) and e.step == 2 for e in events) or name == "two"


def test_other_threads_or_versions_are_refused_unless_allowed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(2, often(base), tmp_path / "run")
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(RunError, match=rf"machine.threads is {before}, this one's is {before + 1}") as caught:
            run(often(base), tmp_path / "run")
        assert "--allow-other-machine" in str(caught.value)
        events = deltaw.train(often(base), tmp_path / "run", train_rows=ROWS, allow_other_machine=True)
        with contextlib.closing(events):
            assert next(iter(events)).first_step == 2
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr("deltaw.train.run.versions", lambda: {**versions(), "torch": "1.0"})
    with pytest.raises(RunError, match=r"versions.torch is '[^']*', this one's is '1.0'"):
        run(often(base), tmp_path / "run")


def test_another_run_is_not_allowed_by_the_flag_for_machines(base: Path, tmp_path: Path) -> None:
    stopped_after(1, often(base), tmp_path / "run")
    with pytest.raises(RunError, match="holds another run"):
        run(often(base, train={"lr": 0.02}), tmp_path / "run", allow_other_machine=True)


def test_two_trainings_in_one_folder_at_once_are_refused(base: Path, tmp_path: Path) -> None:
    with contextlib.closing(deltaw.train(often(base), tmp_path / "run", train_rows=ROWS)) as first:
        next(iter(first))
        with pytest.raises(RunError, match="Another process is training in"):
            run(often(base), tmp_path / "run")
        code = (
            "import sys, pathlib\nfrom deltaw.train.checkpoint import locked\nfrom deltaw.errors import RunError\n"
            "try:\n    with locked(pathlib.Path(sys.argv[1])): pass\nexcept RunError: sys.exit(42)\n"
        )
        ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "run")])
        assert ended.returncode == 42
    assert isinstance(run(often(base), tmp_path / "run")[-1], Done)


# Damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", lambda p: os.truncate(p, p.stat().st_size // 2)),
        ("state.safetensors", lambda p: p.write_bytes(b"")),
        ("state.safetensors", lambda p: p.unlink()),
        ("state.json", lambda p: p.write_text('{"step": ')),
        ("state.json", lambda p: p.write_text('{"step": 2}')),
        ("state.json", lambda p: p.unlink()),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_goes_on(
    base: Path, tmp_path: Path, file: str, damage: Any
) -> None:
    run(often(base), tmp_path / "whole")
    stopped_after(4, often(base), tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "00000004"
    damage(newest / file)
    with pytest.raises(RunError, match=f"Checkpoint {newest} is damaged") as caught:
        run(often(base), tmp_path / "run")
    assert "Remove that folder" in str(caught.value)
    shutil.rmtree(newest)
    assert run(often(base), tmp_path / "run")[0].first_step == 3
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_lost_metrics_do_not_stop_a_run(base: Path, tmp_path: Path) -> None:
    stopped_after(4, often(base), tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    run(often(base), tmp_path / "run")
    assert [e["step"] for e in events_in(tmp_path / "run", "step")] == [5, 6]


def test_rows_that_changed_since_are_refused_before_bad_ones(base: Path, tmp_path: Path) -> None:
    stopped_after(1, often(base), tmp_path / "run")
    with pytest.raises(DataError, match="rows line 1"):
        run(often(base), tmp_path / "run", [{"prompt": "x"}])


def test_a_run_that_is_asked_to_stop_keeps_that_step_and_goes_on_bit_for_bit(base: Path, tmp_path: Path):
    plain = recipe(base, eval={"every_steps": 2})
    whole = run(plain, tmp_path / "whole", valid=VALID)
    asked = iter([False, True])
    first = run(plain, tmp_path / "part", valid=VALID, stop=lambda: next(asked))
    assert isinstance(first[-1], Saved)
    assert first[-1].step == 2
    assert isinstance(first[-2], Eval), "the evaluation of that step is not lost"
    rest = run(plain, tmp_path / "part", valid=VALID, stop=lambda: False)
    assert rest[0].first_step == 2
    steps = [e for e in (*first, *rest) if isinstance(e, Step)]
    kept = (*SAME, "growth")
    assert [[getattr(e, k) for k in kept] for e in steps] == [
        [getattr(e, k) for k in kept] for e in whole if isinstance(e, Step)
    ]
    assert torch.equal(*(torch.cat([t.flatten() for t in result(tmp_path / n).values()]) for n in ("part", "whole")))


def test_a_run_that_is_asked_to_stop_at_its_last_step_is_done(base: Path, tmp_path: Path):
    events = run(recipe(base, train={"steps": 1}), tmp_path / "run", stop=lambda: True)
    assert isinstance(events[-1], Done)
