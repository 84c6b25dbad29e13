"""deltaw export, as a user types it."""

from __future__ import annotations

import json

import pytest
from made_exports import noisy, save_base
from typer.testing import CliRunner

import deltaw
from deltaw.cli.main import app
from deltaw.errors import AdapterError, BadInput
from deltaw.methods.lora import Lora


def run(*args: object):
    return CliRunner().invoke(app, ["export", *map(str, args)])


@pytest.fixture
def base(tmp_path):
    folder = save_base(tmp_path / "base", "llama")
    noisy(folder, Lora(rank=3, alpha=5, rslora=True, rank_pattern={"q_proj": 7})).save(tmp_path / "adapter")
    return folder


def test_export_prints_one_json_object_for_each_format(base, tmp_path):
    adapter = ("--adapter", tmp_path / "adapter")
    origin = deltaw.load_adapter(tmp_path / "adapter").id
    for args in (
        ("gguf", "--base", base, *adapter, "--out", tmp_path / "a.gguf"),
        ("gguf", "--base", base, *adapter, "--merged", "--out", tmp_path / "m.gguf", "--dtype", "bfloat16"),
        ("peft", *adapter, "--out", tmp_path / "peft"),
        ("vllm", "--base", base, *adapter, "--out", tmp_path / "vllm", "--max-rank", 16),
    ):
        result = run(*args, "--json")
        assert result.exception is None, result.exception
        found = json.loads(result.stdout)
        assert found["adapter"] == origin
        assert found["size_bytes"] > 0
    assert (tmp_path / "a.gguf").read_bytes()[:4] == (tmp_path / "m.gguf").read_bytes()[:4] == b"GGUF"


def test_export_says_what_it_wrote(base, tmp_path):
    said = run("gguf", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "a.gguf").stdout
    assert "a.gguf: llama adapter, float32, 28 tensors, alpha 8.66025, 2 scales in B" in said
    said = run("gguf", "--base", base, "--merged", "--out", tmp_path / "m.gguf").stdout
    assert "m.gguf: llama model, float32, 35 tensors, gpt2/gpt-2" in said
    said = run("vllm", "--base", base, "--adapter", tmp_path / "adapter", "--out", tmp_path / "v").stdout
    assert "v: rank 7, alpha 7; serve with --max-lora-rank 8" in said
    assert "peft: lora, 28 tensors" in run("peft", "--adapter", tmp_path / "adapter", "--out", tmp_path / "peft").stdout


def test_export_fails_as_bad_input(base, tmp_path):
    noisy(base, deltaw.Dora(rank=3)).save(tmp_path / "dora")
    for args in (
        ("gguf", "--base", base, "--adapter", tmp_path / "dora", "--out", tmp_path / "a.gguf"),
        ("vllm", "--base", base, "--adapter", tmp_path / "dora", "--out", tmp_path / "v"),
    ):
        found = run(*args).exception
        assert isinstance(found, AdapterError)
        assert found.exit_code == 2
    assert isinstance(run("gguf", "--base", base, "--out", tmp_path / "a.gguf").exception, BadInput)
