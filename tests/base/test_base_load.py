"""From a name to a base: what loads, and what is refused with which words."""

from __future__ import annotations

import json
import logging as python_logging
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from deltaw.errors import BaseError, NotFound
from deltaw.model.describe import describe_base
from deltaw.model.load import (
    check_finite,
    load_tokenizer,
    load_transformers,
    refuse_unsupported,
    resolve_base,
)
from deltaw.model.quiet import quiet
from deltaw.model.starter import fetch_starter

SMALL = {"vocab_size": 264, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 2,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
DENSE = {
    "llama": tf.LlamaConfig(**SMALL),
    "mistral": tf.MistralConfig(**SMALL),
    "qwen2": tf.Qwen2Config(**SMALL),
    "gemma": tf.GemmaConfig(**SMALL, head_dim=6),
    "phi": tf.PhiConfig(**{**SMALL, "hidden_size": 32}),
    "gpt2": tf.GPT2Config(vocab_size=264, n_embd=24, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
                          eos_token_id=2),
    "opt": tf.OPTConfig(vocab_size=264, hidden_size=24, ffn_dim=40, num_hidden_layers=2,
                        num_attention_heads=4, word_embed_proj_dim=24, max_position_embeddings=64),
    "gpt_neox": tf.GPTNeoXConfig(vocab_size=264, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                 num_attention_heads=4, max_position_embeddings=64, bos_token_id=1,
                                 eos_token_id=2),
}  # fmt: skip
EXPERTS = {
    "mixtral": tf.MixtralConfig(**SMALL, num_local_experts=2),
    "qwen2_moe": tf.Qwen2MoeConfig(**SMALL, num_experts=2, moe_intermediate_size=8,
                                   shared_expert_intermediate_size=8, num_experts_per_tok=1),
    "olmoe": tf.OlmoeConfig(**SMALL, num_experts=2, num_experts_per_tok=1),
    "granitemoe": tf.GraniteMoeConfig(**SMALL, num_local_experts=2, num_experts_per_tok=1),
}  # fmt: skip


def build(config):
    torch.manual_seed(0)
    with quiet():
        return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", DENSE)
def test_a_base_loads_whole_frozen_and_unchanged(name, tmp_path):
    model = build(DENSE[name])
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_transformers(tmp_path, "float32")
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    ids = torch.arange(3, 15)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    refuse_unsupported(loaded, attention_only=False)
    check_finite(loaded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_weights_take_the_dtype_asked_for(base, dtype):
    assert {p.dtype for p in load_transformers(base, dtype).parameters()} == {getattr(torch, dtype)}


def test_unknown_dtype_suggests_a_near_one(base):
    with pytest.raises(BaseError, match=r"unknown dtype 'bfloat61'. Did you mean 'bfloat16'"):
        load_transformers(base, "bfloat61")


def test_loading_says_nothing_and_leaves_logging_as_it_was(base, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_transformers(base, "float32")
    load_tokenizer(base)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert capfd.readouterr() == ("", "")
    assert python_logging.getLogger("transformers").level == before[0]


def test_missing_unknown_and_misshapen_tensors_are_listed(base):
    path = base / "model.safetensors"
    state = load_file(path)
    state["model.layers.0.surplus.weight"] = state.pop("model.layers.0.mlp.up_proj.weight")
    state["model.norm.weight"] = torch.zeros(25)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BaseError) as caught:
        load_transformers(base, "float32")
    text = str(caught.value)
    assert "missing: model.layers.0.mlp.up_proj.weight\n" in text
    assert "unknown: model.layers.0.surplus.weight\n" in text
    assert "misshapen: model.norm.weight (file [25], model [24])\n" in text


def test_truncated_safetensors_names_file_and_sizes(base):
    path = base / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(BaseError, match=rf"model.safetensors is truncated: expected {size} bytes, found {size - 7}"):
        load_transformers(base, "float32")


def test_a_pickle_is_refused_by_name(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(BaseError, match=r"(?s)pytorch_model.bin. Pickles .* refused.*save_pretrained"):
        load_transformers(base, "float32")


def test_a_folder_that_is_no_model_says_what_is_missing(base, tmp_path):
    with pytest.raises(BaseError, match=r"has no config.json"):
        load_transformers(tmp_path, "float32")
    (base / "model.safetensors").unlink()
    with pytest.raises(BaseError, match=r"has no model.safetensors, nor model.safetensors.index.json"):
        load_transformers(base, "float32")


@pytest.mark.parametrize("change", [{"model_type": "no_such_thing"}, {"model_type": "t5"}])
def test_what_is_no_causal_model_is_refused(base, change):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(BaseError, match=r"does not load as a causal language model"):
        load_transformers(base, "float32")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "banana"}, {"eos_token_id": "x"}, {"num_attention_heads": 7}, {"num_attention_heads": 0},
        {"hidden_size": "x"}, {"hidden_size": -4}, {"quantization_config": 5}, {"rope_parameters": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_nonsense_in_a_config_is_one_sentence(base, change):
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for read in (lambda: load_transformers(base, "float32"), lambda: describe_base(base)):
        with pytest.raises(BaseError, match=str(base)):
            read()


@pytest.mark.parametrize("index", [{"weight_map": 5}, {"weight_map": {"a": 5}}, {}])
def test_an_index_without_files_is_one_sentence(base, index):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseError, match="has no weight_map of tensors to files"):
        load_transformers(base, "float32")


@pytest.mark.parametrize("tokenizer", [{"model": 5}, {"added_tokens": [5]}, {"model": {"merges": [5]}}])
def test_nonsense_in_a_tokenizer_is_one_sentence(base, tokenizer):
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(BaseError, match=r"tokenizer\.json is not what a model's file holds"):
        describe_base(base)


def test_code_from_a_repository_is_not_run(base):
    config = json.loads((base / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (base / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto}))
    (base / "evil.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(BaseError, match=r"does not load"):
        load_transformers(base, "float32")


def test_a_masked_language_model_is_refused(tmp_path):
    config = tf.BertConfig(vocab_size=264, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
                           num_attention_heads=4, max_position_embeddings=64)  # fmt: skip
    tf.BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(BaseError, match=r"masked language model \(BertForMaskedLM\)"):
        load_transformers(tmp_path, "float32")


def test_nan_in_a_base_is_found_by_name(make):
    model = make.llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(BaseError, match=r"NaN or infinity in model.layers.1.mlp.up_proj.weight"):
        check_finite(model)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_refused_by_name_unless_attention_only(name):
    model = build(EXPERTS[name])
    with pytest.raises(
        BaseError, match=rf"{name} is a mixture of experts.*model.layers.0.\S*(expert|moe)\S*.*model.layers.1"
    ):
        refuse_unsupported(model, attention_only=False)
    assert refuse_unsupported(model, attention_only=True) is None


def test_a_vision_tower_is_refused_by_name_unless_attention_only():
    vision = {"model_type": "clip_vision_model", "hidden_size": 24, "intermediate_size": 40, "image_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 4, "patch_size": 4}  # fmt: skip
    config = tf.LlavaConfig(vision_config=vision, text_config=DENSE["llama"].to_dict(), image_token_index=263)
    model = tf.LlavaForConditionalGeneration(config)
    with pytest.raises(BaseError, match=r"llava is not a plain text model .vision_config.*model.vision_tower"):
        refuse_unsupported(model, attention_only=False)
    assert refuse_unsupported(model, attention_only=True) is None


def test_a_folder_is_its_own_base(base, monkeypatch):
    assert resolve_base(base) == resolve_base(str(base)) == base
    monkeypatch.chdir(base.parent)
    assert resolve_base("base") == Path("base")


def test_a_hub_id_offline_fails_at_once_and_lists_what_was_tried(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    began = time.monotonic()
    with pytest.raises(BaseError) as caught:
        resolve_base("some-org/some-model")
    assert time.monotonic() - began < 5
    text = str(caught.value)
    assert "no base called 'some-org/some-model'" in text
    for tried in ("starter names: smollm2-135m-instruct", "some-org/some-model: not there", "HF_HUB_OFFLINE"):
        assert tried in text


def test_a_hub_model_in_the_hubs_cache_is_found_offline(base, monkeypatch):
    asked = {}

    def download(name, **options):
        asked.update(options, name=name)
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_base("some-org/some-model") == base
    assert asked["name"] == "some-org/some-model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])


@pytest.mark.parametrize("name", ["./not/there", "/not/there", "a/b/c", "missing.gguf", "", "../x"])
def test_what_cannot_be_a_hub_id_never_asks_the_hub(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(BaseError):
        resolve_base(name)


def test_a_wrong_starter_name_suggests_the_near_one(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for ask in (resolve_base, fetch_starter):
        with pytest.raises((BaseError, NotFound), match=r"Did you mean 'smollm2-135m-instruct'"):
            ask("smollm2-135m-instuct")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BaseError, match=r"is a file, but not a .gguf"):
        resolve_base(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"x" * 100)
    with pytest.raises(BaseError, match=r"does not begin with the bytes of a GGUF"):
        resolve_base(tmp_path / "model.gguf")


def test_a_tokenizer_loads_and_its_absence_is_an_error(base):
    tokenizer = load_tokenizer(base)
    assert tokenizer.decode(tokenizer("ab  12\n\t\u00e9").input_ids) == "ab  12\n\t\u00e9"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(BaseError, match=r"no tokenizer that loads"):
        load_tokenizer(base)
