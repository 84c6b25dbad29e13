"""PEFT computes with the exported folder what we compute, and needs nothing but alpha and rank for it."""

from __future__ import annotations

import json

import pytest
import torch
from made_exports import noisy, save_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import deltaw
from deltaw.errors import AdapterError, RunError
from deltaw.methods import METHODS
from deltaw.methods.lora import Lora

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied:UserWarning"),
]

IDS = torch.tensor([[3, 7, 11, 50, 60, 5, 91]])
SAID = [
    Lora(rank=3, alpha=5),
    Lora(rank=3, alpha=5, rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"1.*": 11.0}, bias="lora_only"),
    Lora(rank=3, alpha=5, save_modules=("norm", "lm_head")),
    deltaw.Dora(rank=3, alpha=5, rslora=True),
    deltaw.LongLora(rank=3, alpha=5),
    deltaw.Vera(rank=4),
    deltaw.Ia3(),
    deltaw.Prompt(n_tokens=3),
    deltaw.PTuning(n_tokens=3),
    deltaw.PrefixTuning(n_tokens=3),
]
NOT_SAID = [
    (deltaw.Houlsby(), "method 'houlsby' is not in PEFT"),
    (deltaw.BitFit(), "method 'bitfit' is not in PEFT"),
    (deltaw.LongLora(rank=3, max_positions=128), "settings of the base are changed: max_position_embeddings"),
    (Lora(rank=3, new_tokens=("<new>",)), r"new tokens \(<new>\) need a tokenizer"),
]


def ours(base, adapter):
    model = deltaw.load_base(base)
    model.attach(adapter)
    with torch.no_grad():
        return model.logits(IDS)


@pytest.mark.parametrize("spec", SAID, ids=[f"{s.name}-{i}" for i, s in enumerate(SAID)])
def test_export_peft_is_what_we_compute(spec, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, spec)
    report = deltaw.export_peft(adapter, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config.get("use_rslora", False) is False
    assert report.adapter == adapter.id
    net = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    with torch.no_grad():
        found = net(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(found, ours(base, adapter), rtol=1e-5, atol=1e-5)
    assert (found - deltaw.load_base(base).logits(IDS)).abs().max() > 0.05


@pytest.mark.parametrize(("spec", "said"), NOT_SAID, ids=[f"{s.name}-{i}" for i, (s, _) in enumerate(NOT_SAID)])
def test_export_peft_lists_what_peft_cannot_say(spec, said, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    with pytest.raises(AdapterError, match=said):
        deltaw.export_peft(noisy(base, spec), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_peft_refuses_nan(tmp_path):
    adapter = noisy(save_base(tmp_path / "base", "llama"), Lora(rank=3, alpha=5))
    adapter.sites["model.layers.0.mlp.up_proj"]["B"][1, 2] = float("nan")
    with pytest.raises(AdapterError, match=r"NaN or Inf in model\.layers\.0\.mlp\.up_proj:B: take"):
        deltaw.export_peft(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_peft_has_an_answer_for_every_method():
    assert {m.name for m in METHODS} - {"full"} == {s.name for s in SAID} | {s.name for s, _ in NOT_SAID}


def test_export_peft_says_each_scale_where_it_differs(tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    spec = Lora(rank=4, alpha=5, rslora=True, rank_pattern={"0.self_attn.q_proj": 9})
    report = deltaw.export_peft(noisy(base, spec), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    name = "model.layers.0.self_attn.q_proj"
    assert (config["r"], config["lora_alpha"]) == (4, 10)  # 5 / sqrt(4) = 10 / 4
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({name: 9}, {name: pytest.approx(15.0)})
    assert (report.rank, report.alpha, report.n_apart) == (4, 10.0, 1)


def test_export_peft_takes_the_tokenizer_of_new_tokens_along(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = noisy(base, Lora(rank=3, new_tokens=("<new>",)))
    adapter.save(tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    deltaw.export_peft(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "deltaw.json").exists()
    rows = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any("trainable_tokens_delta" in name for name in rows)


def test_export_peft_writes_over_nothing(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="is there already"):
        deltaw.export_peft(noisy(base, Lora(rank=3)), tmp_path / "out")
