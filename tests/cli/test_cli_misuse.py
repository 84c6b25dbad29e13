"""What a hurried or unlucky user does: one sentence that says what to do, never a number that looks right."""

from __future__ import annotations

import json
import math
import shutil
import socket
import warnings
from pathlib import Path

import pytest
import torch
from ended import Call, refused
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel

import deltaw
from deltaw.errors import AdapterError, BaseError, RunError, TargetError, WorkFailed
from deltaw.model.base import load_base
from deltaw.store.files import whole_folder
from deltaw.store.peft import UnfinishedRun, read_adapter
from train.tiny_runs import ROWS, recipe, run, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    return tmp_path / "rows.jsonl"


def test_a_base_with_nan_is_refused_and_never_scored(deltaw: Call, base: Path, rows: Path, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    shutil.copytree(base, sick)
    tensors = load_file(sick / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, sick / "model.safetensors", metadata={"format": "pt"})
    for command in (["eval", "--data", rows, "--metric", "perplexity"], ["generate", "hello"]):
        refused(deltaw(*command, "--base", sick), "BaseError", "NaN or infinity in model.norm.weight")


def test_an_encoder_is_no_base(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    net = BertLMHeadModel(config)
    net.config.architectures = ["BertLMHeadModel"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.save_pretrained(tmp_path / "bert")
        with pytest.raises(BaseError, match="not a causal language model"):
            load_base(tmp_path / "bert")


def test_an_adapter_trained_on_chats_answers_as_in_a_chat(deltaw: Call, base: Path, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]}
        for r in ROWS
    ]
    run(recipe(base, train={"steps": 1}), tmp_path / "run", rows=chats)
    bare = deltaw("generate", "--base", base, "ab ?", "--json").json
    chat = deltaw("generate", "--base", base, "--chat", "ab ?", "--json").json
    worn = deltaw("generate", "--base", base, "--adapter", tmp_path / "run", "ab ?", "--json").json
    assert worn["prompt_tokens"] == chat["prompt_tokens"] > bare["prompt_tokens"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": {"q_prjo": 8}}, "rank_pattern 'q_prjo'"),
        ({"alpha_pattern": {"nowhere": 8}}, "alpha_pattern 'nowhere'"),
        ({"exclude": "zzz"}, "exclude 'zzz'"),
        ({"save_modules": ("proj",)}, "which is targeted too"),
    ],
)
def test_a_setting_for_places_that_do_not_exist_is_an_error(base: Path, settings: dict, said: str) -> None:
    model = load_base(base)
    with pytest.raises(TargetError, match=said):
        model.attach(deltaw_lora(**settings))
    assert not model.adapters


def deltaw_lora(**settings: object) -> deltaw.Lora:
    return deltaw.Lora(**{"rank": 3, "alpha": 5, **settings})


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for wrong in ({"rank_pattern": {"(": 8}}, {"alpha_pattern": {"[": 8.0}}):
        with pytest.raises(deltaw.DeltawError, match="no regular expression"):
            deltaw_lora(**wrong)
    for wrong in ({"targets": ["q_proj"]}, {"layers": "0-3"}, {"save_modules": ["norm"]}, {"new_tokens": ["<a>"]}):
        with pytest.raises(deltaw.DeltawError, match="trains every weight and has no settings"):
            deltaw.Full(**wrong)
    assert deltaw.Full().trains_base


def test_the_python_surface_refuses_what_it_cannot_take(base: Path) -> None:
    model = load_base(base, dtype=torch.float32)
    for what in (3, None, {}, deltaw.Lora):
        with pytest.raises(AdapterError, match="Cannot attach"):
            model.attach(what)  # type: ignore[arg-type]
    for name in (None, 5, ""):
        with pytest.raises(AdapterError, match="name is a word"):
            model.attach(deltaw_lora(), name=name)  # type: ignore[arg-type]
    model.attach(deltaw_lora())
    for which in (3, ["default"], {"default": math.nan}, {"default": "one"}):
        with pytest.raises(AdapterError):
            model.use(which)  # type: ignore[arg-type]
    assert model.run.use == {"default": 1.0}
    with pytest.raises(BaseError, match="path or a name"):
        load_base(None)  # type: ignore[arg-type]


def test_an_unfinished_run_is_said_and_a_lost_result_is_an_error(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(recipe(base, train={"steps": 2}), out)
    (out / "done.json").rename(tmp_path / "done.json")
    with pytest.warns(UnfinishedRun, match="is not done"):
        read_adapter(out)
    (tmp_path / "done.json").rename(out / "done.json")
    assert read_adapter(out).id
    shutil.rmtree(out / "adapter")
    with pytest.raises(RunError, match="is gone"):
        run(recipe(base, train={"steps": 2}), out)


def test_text_has_no_end_token_in_its_perplexity(deltaw: Call, base: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "abcdef"}) + "\n")
    found = deltaw("eval", "--base", base, "--data", tmp_path / "t.jsonl", "--metric", "perplexity", "--json").json
    assert found["target_tokens"] == 5


def test_places_that_cannot_be_written_to_are_said_before_the_work(
    deltaw: Call, base: Path, rows: Path, tmp_path: Path
) -> None:
    ended = deltaw("eval", "--base", base, "--data", rows, "--metric", "exact", "--predictions", tmp_path)
    refused(ended, "WorkFailed", "Cannot write", code=1)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WorkFailed, match="Cannot write"), whole_folder(tmp_path / "file" / "out"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_no_system_takes_is_one_sentence(deltaw: Call, base: Path, trained: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in (long, tmp_path / "loop"):
        ended = deltaw("merge", "--base", base, "--adapter", trained, "--out", out)
        assert ended.code in (1, 2)
        assert "Traceback" not in ended.err
        assert "too long" in ended.err or "symbolic links" in ended.err
    refused(deltaw("generate", "--base", long, "ab ?"), "BaseError", "too long")


def test_a_truncated_gguf_is_one_sentence(deltaw: Call, tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    ended = deltaw("generate", "--base", tmp_path / "x.gguf", "hello")
    assert (ended.code, ended.out) == (2, "")
    assert "BaseError: x.gguf cannot be read as a model" in ended.err
    assert "Traceback" not in ended.err


def test_a_port_that_is_taken_is_said_before_the_model_is_read(deltaw: Call, base: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = deltaw("serve", "--base", base / "absent", "--port", port)
        refused(ended, "ServeError", f"Cannot listen on 127.0.0.1, port {port}", "Choose another --host or --port")
    refused(deltaw("serve", "--base", base, "--host", "no.such.host.invalid"), "ServeError", "no.such.host.invalid")


def test_numbers_at_the_ends_of_their_ranges_sample(deltaw: Call, base: Path) -> None:
    greedy = deltaw("generate", "--base", base, "ab ?", "--max-tokens", 4).out
    assert deltaw("generate", "--base", base, "ab ?", "--max-tokens", 4, "--temperature", 1e-320).out == greedy
    ended = deltaw("generate", "--base", base, "ab ?", "--temperature", 1, "--seed", 10**30)
    assert (ended.code, ended.out) == (2, "")
    assert "--seed" in ended.err


def test_an_answer_of_nothing_is_said(deltaw: Call, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaw.model.generate.generate", lambda model, prompts, *_, **__: [[] for _ in prompts])
    ended = deltaw("generate", "--base", base, "ab ?")
    assert (ended.code, ended.out) == (0, "\n")
    assert "The answer is empty" in ended.err


def test_sampling_from_no_probability_at_all_takes_the_likeliest(deltaw: Call, base: Path) -> None:
    greedy = deltaw("generate", "--base", base, "ab ?", "--max-tokens", 4).out
    assert deltaw("generate", "--base", base, "ab ?", "--max-tokens", 4, "--temperature", 1, "--top-p", 0).out == greedy
