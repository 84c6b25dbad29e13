"""deltaw combine, extract and compress, as a user types them."""

from __future__ import annotations

import json

import pytest
import torch
from made_bases import logits, noisy
from typer.testing import CliRunner

import deltaw
from deltaw.cli.main import app
from deltaw.errors import BadInput
from deltaw.methods.dora import Dora
from deltaw.methods.lora import Lora
from deltaw.store.peft import read_adapter
from models import make_ids, make_net

IDS = make_ids()


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def run_json(*args: object) -> dict:
    result = run(*args, "--json")
    assert result.exception is None, result.exception
    return json.loads(result.stdout)


@pytest.fixture
def base(saved):
    return saved(make_net("llama", num_hidden_layers=1))


@pytest.fixture
def two(base, tmp_path):
    folders = []
    for i, spec in enumerate((Lora(rank=3, alpha=5), Dora(rank=2, alpha=9, targets=("q_proj",)))):
        noisy(base, spec, seed=i + 1).save(tmp_path / f"a{i}")
        folders += ["--adapter", tmp_path / f"a{i}"]
    return folders


def test_combine_writes_an_adapter_and_says_what_it_lost(base, two, tmp_path):
    arguments = ("combine", *two, "--weight", 0.5, "--weight", -2, "--method", "svd", "--rank", 4, "--base", base)
    found = run_json(*arguments, "--out", tmp_path / "out")
    assert found["weights"] == [0.5, -2.0]
    assert {c["site"].rpartition(".")[2]: c["rank"] for c in found["sites"]}["q_proj"] == 4
    assert read_adapter(tmp_path / "out").id == found["adapter"]
    told = run(*arguments, "--out", tmp_path / "again").stdout.splitlines()
    (lossy,) = (c for c in found["sites"] if c["error"] > 0)
    assert told[0] == f"model.layers.0.self_attn.q_proj: rank 4, relative error {lossy['error']:.3g}"
    assert "0.5 x " in told[-1]
    assert f"relative error {found['error']:.3g}" in told[-1]


def test_combine_writes_a_base(base, two, tmp_path):
    arguments = ("combine", *two, "--method", "dare_ties", "--density", 0.5, "--shared-mask", "--base", base)
    found = run_json(*arguments, "--seed", 3, "--into-base", tmp_path / "out")
    assert (found["into"], found["adapter"], found["n_tensors_changed"]) == ("base", None, 7)
    run(*arguments, "--seed", 3, "--into-base", tmp_path / "same")
    told = run(*arguments, "--seed", 4, "--into-base", tmp_path / "other").stdout
    assert "7 tensors changed" in told
    first, same, other = (logits(tmp_path / name, IDS) for name in ("out", "same", "other"))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_what_combine_refuses_is_bad_input(two, tmp_path):
    result = run("combine", *two, "--out", tmp_path / "out")
    assert isinstance(result.exception, BadInput)
    assert result.exception.exit_code == 2
    assert run("combine", "--out", tmp_path / "out").exit_code == 2


def test_compress_and_extract_print_each_place_and_the_whole(base, two, tmp_path):
    found = run_json("compress", "--adapter", two[1], "--rank", 2, "--out", tmp_path / "small")
    assert {(c["rank"], c["rank_before"]) for c in found["sites"]} == {(2, 3)}
    told = run("compress", "--adapter", two[1], "--error", 0.9, "--out", tmp_path / "smaller").stdout.splitlines()
    assert len(told) == 7 + 1
    assert " of 3, relative error 0." in told[0]
    deltaw.bake(base, tmp_path / "a0", tmp_path / "tuned", measure=False)
    models = ("--base", base, "--tuned", tmp_path / "tuned")
    found = run_json("extract", *models, "--energy", 0.9999, "--out", tmp_path / "x")
    assert {c["rank"] for c in found["sites"]} <= {1, 2, 3}
    result = run("extract", *models, "--rank", 1, "--out", tmp_path / "y")
    assert len(result.stderr.splitlines()) >= 7
    assert "over 7 linear maps; kept whole: 0 tensors and 0 biases" in result.stdout


def test_python_has_the_same_under_the_package(base, two, tmp_path):
    one = deltaw.combine([two[1]], [0.5], out=tmp_path / "one")
    two_ = deltaw.compress(tmp_path / "one", tmp_path / "two", rank=1)
    assert two_.parent == one.adapter
    deltaw.bake(base, tmp_path / "one", tmp_path / "tuned", measure=False)
    assert deltaw.extract(base, tmp_path / "tuned", tmp_path / "three", rank=3).error < 1e-5
