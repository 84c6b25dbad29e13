"""`deltaw quantize`, and the other commands on quantised bases."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ended import Call, Ended, refused
from safetensors.torch import load_file

from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import prompt_ids
from deltaw.merge.quantise import quantise_base
from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.model.model import Model
from deltaw.model.quantised import Format, frozen_weights
from deltaw.train.evaluate import evaluate_rows
from train.tiny_runs import ROWS, VALID, events_in, recipe, run, write_rows

KEYS = ["out", "base", "format", "bits", "n_quantised", "quantised_bytes", "dense_bytes", "size_bytes", "seconds"]
KEYS += ["calibration"]


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """The tiny base in nf4 with double quantisation."""
    quantise_base(base, tmp_path / "quantised", Format("nf4", 64, True))
    return tmp_path / "quantised"


def test_quantize_says_what_it_wrote(deltaw: Call, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = deltaw("quantize", "--base", base, "--out", out, "--block", 32, "--double-quant", "--json")
    assert ended.code == 0
    assert ended.err == f"quantising {base} to nf4-32+dq\n"
    told = ended.json
    assert list(told) == KEYS
    assert told["calibration"] is None
    model = load_base(out)
    weights = frozen_weights(model.net).values()
    n_bytes, n_values = sum(w.nbytes() for w in weights), sum(w.in_features * w.out_features for w in weights)
    assert (told["out"], told["format"], told["n_quantised"]) == (str(out), "nf4-32+dq", len(weights))
    assert (told["base"], told["quantised_bytes"]) == (model.fingerprint.short(), n_bytes)
    assert told["bits"] == pytest.approx(8 * n_bytes / n_values)
    assert told["size_bytes"] == (out / "model.safetensors").stat().st_size
    again = deltaw("quantize", "--base", base, "--out", tmp_path / "more", "--format", "int8", "--dtype", "bfloat16")
    assert again.code == 0
    assert f"{tmp_path / 'more'}: {len(weights)} linear maps in int8 (8.500 bits a weight, " in again.out
    assert {p.dtype for p in load_base(tmp_path / "more", dtype="bfloat16").net.parameters()} == {torch.bfloat16}
    head = load_file(tmp_path / "more" / "model.safetensors")["lm_head.weight"]
    assert head.dtype == torch.bfloat16


def test_quantize_for_a_text_says_so_and_inspect_shows_it(deltaw: Call, base: Path, tmp_path: Path) -> None:
    text = write_rows(tmp_path / "text.jsonl", ROWS * 9)
    how = ("--base", base, "--calibrate", text, "--calibrate-tokens", 700)
    ended = deltaw("quantize", *how, "--out", tmp_path / "out", "--json")
    assert ended.code == 0
    told = ended.json["calibration"]
    before, after = told["tuned"]["before"], told["tuned"]["after"]
    first = f"quantising {base} to nf4\ncalibrating on 640 tokens of {text}\ntuned scales, pass 1 of 1: "
    assert ended.err.startswith(first)
    assert ended.err.endswith(f" nats from dense, {before:.4f} before\n")
    assert after <= before
    untuned = deltaw("quantize", *how, "--tune-passes", 0, "--out", tmp_path / "untuned", "--json")
    assert "tuned" not in untuned.json["calibration"]
    assert (told["data"], told["tokens"], told["window"], told["maps"]) == ("text.jsonl", 640, 64, 14)
    assert deltaw("inspect", tmp_path / "out", "--json").json["calibration"] == told
    shown = deltaw("inspect", tmp_path / "out").out
    assert "calibration" in shown
    assert "text.jsonl" in shown
    few = deltaw("quantize", *how[:-1], 60, "--out", tmp_path / "more", "--json")
    assert (few.code, few.out) == (2, "")
    assert "DataError: calibration has 0 tokens (windows of 64), and the widest map has 40 inputs." in few.err


def test_quantize_refuses_in_one_sentence_and_writes_nothing(
    deltaw: Call, base: Path, folder: Path, tmp_path: Path
) -> None:
    def call(**changes: object) -> Ended:
        options = {"base": base, "out": tmp_path / "out", **changes}
        ended = deltaw("quantize", *(x for k, v in options.items() for x in (f"--{k}", v)), "--json")
        return Ended(ended.code, ended.out, ended.err.removeprefix(f"quantising {base} to nf4\n"))

    refused(call(format="nf5"), "BaseError", "unknown format 'nf5'. Did you mean 'nf4'")
    refused(call(format="dense"), "BaseError", "unknown format 'dense'. Known: nf4, fp4, int4, int8")
    refused(call(block=48), "BaseError", "a block of 48 values is not possible", "Take one of 32")
    for alone in ("tune-passes", "calibrate-tokens"):
        refused(call(**{alone: 3}), "BadInput", "belong to a text: pass --calibrate FILE too")
    refused(call(dtype="bfloat61"), "BaseError", "Did you mean 'bfloat16'")
    refused(call(base=tmp_path / "nowhere"), "BaseError", "nowhere")
    refused(call(base=folder), "BaseError", "is quantised already (nf4+dq)")
    refused(call(out=folder), "RunError", "holds something", "Choose another --out")
    refused(call(out=base / "config.json"), "RunError", "is a file")
    refused(call(out=base / "config.json" / "below"), "WorkFailed", "Cannot write below", code=1)
    assert deltaw("quantize", "--base", base, "--out", tmp_path / "out", "--block", "many").code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quantised"]


def test_a_file_too_large_for_its_place_is_one_sentence(deltaw: Call, base: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        ended = deltaw("quantize", "--base", base, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert ended.code == 1
    assert "WorkFailed: out in " in ended.err
    assert "Traceback" not in ended.err
    assert list(tmp_path.iterdir()) == []


def test_two_writers_to_one_place_do_not_overwrite_each_other(
    deltaw: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deltaw.merge.quantise as module

    write = module.write_beside

    def meanwhile(*arguments: Any) -> None:
        write(*arguments)
        monkeypatch.setattr(module, "write_beside", write)
        quantise_base(base, tmp_path / "out", Format("int8"))

    monkeypatch.setattr(module, "write_beside", meanwhile)
    ended = deltaw("quantize", "--base", base, "--out", tmp_path / "out")
    assert ended.code == 2
    assert "RunError" in ended.err
    assert load_base(tmp_path / "out").fingerprint.format == "int8"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", [".", "link", "dangling"])
def test_out_may_be_the_current_folder_or_a_link(
    deltaw: Call, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    (tmp_path / "dangling").symlink_to("new")
    monkeypatch.chdir(tmp_path / "here")
    place = Path(".") if out == "." else tmp_path / out
    assert deltaw("quantize", "--base", base, "--out", place).code == 0
    assert load_base(tmp_path / ("new" if out == "dangling" else "here")).fingerprint.format == "nf4"
    assert (tmp_path / "link").is_symlink()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_kill_at_any_moment_leaves_nothing_at_out(base: Path, tmp_path: Path, cache: Path) -> None:
    text = write_rows(tmp_path / "text.jsonl", ROWS * 9)
    program = Path(__file__).with_name("killed_quantise.py")
    command = [sys.executable, "-W", "ignore", str(program), str(base), str(tmp_path / "out"), str(cache), str(text)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [(t["moment"], t["ended"]) for t in told] == [
        ("tuning", -signal.SIGKILL), ("weights", -signal.SIGKILL), ("note", -signal.SIGKILL),
        ("rename", -signal.SIGKILL), ("never", 0),
    ], ended.stderr  # fmt: skip
    assert [t["there"] for t in told[:-1]] == [None] * 4
    assert {"config.json", "model.safetensors", "deltaw_base.json"} <= set(told[-1]["there"])
    assert load_base(tmp_path / "out").fingerprint.format == "nf4+dq"


# The other commands ------------------------------------------------------------------------------------


def test_eval_quantises_when_asked(deltaw: Call, base: Path, folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    command = ["eval", "--data", rows, "--metric", "perplexity", "--dtype", "float32", "--json"]
    asked = deltaw(*command, "--base", base, "--format", "nf4", "--double-quant")
    saved, dense = deltaw(*command, "--base", folder), deltaw(*command, "--base", base)
    assert (asked.code, saved.code, dense.code) == (0, 0, 0)
    model = load_base(base, format="nf4", double_quant=True)
    wanted = evaluate_rows(model, read_rows(rows), "perplexity", DataSpec(max_tokens=2048))
    assert asked.json["value"] == saved.json["value"] == wanted["value"] != dense.json["value"]


def test_generate_quantises_when_asked(deltaw: Call, base: Path) -> None:
    def answer(model: Model) -> list[int]:
        row = read_rows([{"prompt": ROWS[0]["prompt"], "completion": ""}])[0]
        return generate(model, [prompt_ids(row, model.tokenizer, DataSpec())], 30)[0]

    model = load_base(base, format="fp4", block=4096)
    tokens = answer(model)
    assert tokens != answer(load_base(base))
    command = ["generate", "--base", base, "--max-tokens", 30, "--dtype", "float32", "--json", ROWS[0]["prompt"]]
    told = deltaw(*command, "--format", "fp4", "--block", 4096).json
    assert (told["text"], told["tokens"]) == (model.tokenizer.decode(tokens), len(tokens))


def test_settings_of_a_format_need_the_format(deltaw: Call, base: Path, folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    for command in (["eval", "--data", rows, "--metric", "perplexity"], ["generate", "hi"]):
        refused(deltaw(*command, "--base", base, "--double-quant"), "BaseError", "belong to a quantised format")
        refused(deltaw(*command, "--base", base, "--block", 32), "BaseError", "belong to a quantised format")
        refused(deltaw(*command, "--base", base, "--format", "nf5"), "BaseError", "Did you mean 'nf4'")
        refused(deltaw(*command, "--base", folder, "--format", "int8"), "BaseError", "they cannot become int8")


def test_inspect_says_the_format(deltaw: Call, base: Path, folder: Path) -> None:
    told, dense = deltaw("inspect", folder, "--json").json, deltaw("inspect", base, "--json").json
    assert (told["format"], dense["format"]) == ("nf4+dq", "dense")
    assert told["n_parameters"] == dense["n_parameters"]
    assert told["size_mb"] == round((folder / "model.safetensors").stat().st_size / 1e6, 3) < dense["size_mb"]
    assert told["linear_maps"] == dense["linear_maps"]
    shown = deltaw("inspect", folder).out
    assert "nf4+dq" in shown


# Training ------------------------------------------------------------------------------------------------

QLORA = {
    "base": {"format": "nf4", "double_quant": True, "block": 32},
    "adapter": {"dropout": 0.2},
    "train": {"epochs": 3, "save_every_s": 0},
    "eval": {"every_steps": 3},
}


def test_train_on_a_quantised_base_is_the_library_s_run(deltaw: Call, base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "valid.jsonl", VALID)
    plain = recipe(base, **QLORA, data={"train": "rows.jsonl", "valid": "valid.jsonl"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    assert deltaw("train", tmp_path / "recipe.yaml", "--out", tmp_path / "cli").code == 0
    run(recipe(base, **QLORA), tmp_path / "library", valid=VALID)
    same_run(tmp_path / "cli", tmp_path / "library")
    first, *_, last = [e["loss"] for e in events_in(tmp_path / "cli", "step")]
    assert last < first
    kept = json.loads((tmp_path / "cli" / "run.json").read_text())
    assert "nf4-32+dq" in json.dumps(kept)
    told = deltaw("inspect", tmp_path / "cli", "--json").json
    assert "nf4-32+dq" in json.dumps(told)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_a_killed_run_on_a_quantised_base_goes_on_bit_for_bit(base: Path, tmp_path: Path, cache: Path) -> None:
    plain = recipe(base, **QLORA)
    run(plain, tmp_path / "whole", valid=VALID)
    kills = ["event:3", "checkpoint:2", "state:1", "event:5"]
    plan = {"recipe": plain, "out": str(tmp_path / "out"), "cache": str(cache), "rows": ROWS, "valid": VALID}
    program = Path(__file__).parents[1] / "train" / "killed_runs.py"
    command = [sys.executable, "-W", "ignore", str(program), json.dumps({**plan, "kills": kills})]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [-signal.SIGKILL] * len(kills) + [0], ended.stderr
    same_run(tmp_path / "out", tmp_path / "whole")
    assert events_in(tmp_path / "out", "start")[-1]["first_step"] > 0


def same_run(out: Path, whole: Path) -> None:
    """The same numbers of every step, and the same adapter, bit for bit."""
    keys = ("step", "loss", "lr", "grad_norm", "tokens", "target_tokens")
    found = [[e[k] for k in keys] for e in events_in(out, "step")]
    assert found == [[e[k] for k in keys] for e in events_in(whole, "step")]
    mine, wanted = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (out, whole))
    assert mine.keys() == wanted.keys() != set()
    assert all(torch.equal(mine[k], t) for k, t in wanted.items())
