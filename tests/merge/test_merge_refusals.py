"""bake: what it refuses, and that nothing is left behind."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from made_bases import TEXT, noisy, save_base

from deltaw.core.adapter import Adapter
from deltaw.errors import AdapterError, BadInput, BaseError, BaseMismatch, NotMergeable, RunError, WorkFailed
from deltaw.merge.bake import bake
from deltaw.methods.full import Full
from deltaw.methods.lora import Lora
from deltaw.model.identity import OtherBaseWarning
from models import make_net


@pytest.fixture
def base(saved):
    return saved(make_net("llama"))


def left(tmp_path):
    return sorted(p.name for p in tmp_path.iterdir() if p.name not in ("base", "other", "adapter"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_in_the_adapter_is_refused_and_leaves_nothing(base, tmp_path, bad):
    adapter = noisy(base)
    adapter.sites["model.layers.1.mlp.up_proj"]["A"][2, 5] = bad
    with pytest.raises(AdapterError, match=r"model\.layers\.1\.mlp\.up_proj holds NaN or Inf in A"):
        bake(base, adapter, tmp_path / "out", text=TEXT)
    assert left(tmp_path) == []


@pytest.mark.parametrize("measure", [True, False])
def test_a_sum_that_overflows_is_refused_and_leaves_nothing(base, tmp_path, measure):
    adapter = noisy(base)
    for part in "AB":
        adapter.sites["model.layers.1.mlp.up_proj"][part].fill_(1e30)
    with pytest.raises(WorkFailed, match=r"up_proj\.weight: .*NaN or Inf"):
        bake(base, adapter, tmp_path / "out", text=TEXT, measure=measure)
    assert left(tmp_path) == []


def test_nan_in_a_saved_module_is_refused(base, tmp_path):
    adapter = noisy(base, Lora(rank=3, alpha=5, save_modules=("norm",)))
    adapter.replaced[0].value[3] = float("nan")
    with pytest.raises(AdapterError, match=r"norm\.weight holds NaN or Inf"):
        bake(base, adapter, tmp_path / "out", measure=False)
    assert left(tmp_path) == []


def test_values_too_large_for_float16_are_refused(base, tmp_path):
    adapter = noisy(base)
    adapter.sites["model.layers.0.self_attn.q_proj"]["B"].fill_(1e6)
    with pytest.raises(WorkFailed, match=r"q_proj\.weight: NaN or Inf in float16.*--dtype bfloat16"):
        bake(base, adapter, tmp_path / "out", dtype="float16", measure=False)
    assert left(tmp_path) == []


@pytest.mark.parametrize("content", ["notes.txt", ".hidden"])
def test_an_output_folder_that_holds_something_is_refused(base, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / content).write_text("mine")
    with pytest.raises(RunError, match=r"out holds something.*\n.*--out"):
        bake(base, noisy(base), out, text=TEXT)
    assert [p.name for p in out.iterdir()] == [content]


def test_an_empty_output_folder_is_filled(base, tmp_path):
    (tmp_path / "out").mkdir()
    bake(base, noisy(base), tmp_path / "out", measure=False)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert left(tmp_path) == ["out"]


def test_a_file_as_output_is_refused(base, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        bake(base, noisy(base), tmp_path / "out", text=TEXT)


def test_another_base_is_refused_naming_the_field(base, tmp_path):
    other = save_base(make_net("llama", seed=1), tmp_path / "other")
    adapter = noisy(base)
    with pytest.raises(BaseMismatch, match=r"(?s)weights: adapter has .*--allow-other-base"):
        bake(other, adapter, tmp_path / "out", text=TEXT)
    assert left(tmp_path) == []
    with pytest.warns(OtherBaseWarning, match="weights"):
        report = bake(other, adapter, tmp_path / "out", text=TEXT, allow_other_base=True)
    assert report.probe.logit_max < 1e-4


def test_a_truncated_base_is_named(base, tmp_path):
    adapter = noisy(base)
    path = base / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 100)
    with pytest.raises(BaseError, match=rf"model\.safetensors is truncated: expected {size} bytes"):
        bake(base, adapter, tmp_path / "out", text=TEXT)
    assert left(tmp_path) == []


def test_an_adapter_that_does_not_fit_is_refused(base, tmp_path):
    adapter = noisy(base)
    sites = {k: v for k, v in adapter.sites.items() if k != "model.layers.0.mlp.up_proj"}
    broken = replace(adapter, sites=sites, places=tuple(p for p in adapter.places if p.name in sites))
    with pytest.raises(AdapterError, match=r"no tensors for model\.layers\.0\.mlp\.up_proj"):
        bake(base, broken, tmp_path / "out", text=TEXT)


def test_full_fine_tuning_is_not_mergeable(base, tmp_path):
    with pytest.raises(NotMergeable, match="'full' trains the base itself"):
        bake(base, Adapter(Full(), {}), tmp_path / "out")


def test_a_quantised_base_is_refused(base, tmp_path):
    adapter = noisy(base)
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(BaseError, match="quantised already, by gptq"):
        bake(base, adapter, tmp_path / "out", text=TEXT)


def test_an_unknown_dtype_is_refused_with_the_near_name(base, tmp_path):
    with pytest.raises(BadInput, match="Did you mean 'bfloat16'"):
        bake(base, noisy(base), tmp_path / "out", dtype="bfloat")


def test_tokens_of_another_tokenizer_are_refused(base, tmp_path):
    adapter = noisy(base, Lora(rank=3, alpha=5, new_tokens=("<a>", "<b>")))
    wrong = tuple(replace(r, rows=(60, 61)) for r in adapter.replaced)
    with pytest.raises(AdapterError, match=r"numbers \[53, 54\].*numbers \[60, 61\]"):
        bake(base, replace(adapter, replaced=wrong), tmp_path / "out", measure=False)
    assert left(tmp_path) == []


def test_a_full_disk_leaves_nothing(base, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    adapter = noisy(base)
    monkeypatch.setattr("deltaw.merge.checkpoint.save_file", full)
    with pytest.raises(WorkFailed, match="No space left"):
        bake(base, adapter, tmp_path / "out", measure=False)
    assert left(tmp_path) == []
    assert torch.isfinite(adapter.sites["model.layers.0.mlp.up_proj"]["A"]).all()
