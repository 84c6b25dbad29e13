"""A whole model as GGUF is the model: read back by transformers, and tensor by tensor."""

from __future__ import annotations

import json

import pytest
import torch
from made_exports import byte_bpe, noisy, read, save_base, sentencepiece_bpe, unpermuted
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import deltaw
from deltaw.core.fingerprint import fingerprint_folder, set_cache_dir
from deltaw.errors import BaseError, NotMergeable, RunError
from deltaw.methods.lora import Lora
from deltaw.model.load import resolve_base
from deltaw.model.starter import convert_gguf

IDS = torch.tensor([[3, 7, 11, 50, 60, 5, 91]])
READS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # transformers reads these back


def our_logits(folder, adapter=None):
    model = deltaw.load_base(folder)
    if adapter is not None:
        model.attach(adapter)
    with torch.no_grad():
        return model.logits(IDS)


def read_back(path):
    """The logits of transformers' own reading of a GGUF file."""
    net = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        return net(IDS).logits


# transformers makes Llama's maps without biases when it reads GGUF, and takes Qwen3's heads to have 128 features
PLAIN = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 128},
}


@pytest.mark.parametrize("arch", READS)
@pytest.mark.parametrize("with_adapter", [False, True], ids=["base", "merged"])
def test_export_gguf_model_is_read_back_by_transformers_with_the_same_logits(arch, with_adapter, tmp_path):
    base = save_base(tmp_path / "base", arch, **PLAIN.get(arch, {}))
    adapter = noisy(base, Lora(rank=3, alpha=5, rslora=True)) if with_adapter else None
    report = deltaw.export_gguf(base, tmp_path / "out" / "m.gguf", adapter=adapter, merged=True)
    assert (report.kind, report.architecture, report.dtype) == ("model", READS[arch], "float32")
    wanted = our_logits(base, adapter)
    torch.testing.assert_close(read_back(tmp_path / "out" / "m.gguf"), wanted, rtol=0, atol=1e-5)
    if with_adapter:
        assert (wanted - our_logits(base)).abs().max() > 0.1


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"])
def test_export_gguf_model_holds_every_tensor_of_the_merged_checkpoint_once(arch, tmp_path):
    base = save_base(tmp_path / "base", arch)
    config = json.loads((base / "config.json").read_text())
    adapter = noisy(base, Lora(rank=3, alpha=5, bias="lora_only" if arch == "qwen2" else "none"))
    deltaw.export_gguf(base, tmp_path / "m.gguf", adapter=adapter, merged=True)
    deltaw.bake(base, adapter, tmp_path / "merged", measure=False)
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    _, found = read(tmp_path / "m.gguf")
    for name in ("attn_q", "attn_k"):
        heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"] if arch != "gpt2" else 0
        for key, value in found.items():
            if f".{name}." in key and arch in ("llama", "mistral"):
                found[key] = unpermuted(value, heads)
    assert len(found) == len(wanted)
    left = list(found.values())
    for name, value in wanted.items():
        value = value.T if arch == "gpt2" and name.endswith(("attn.weight", "proj.weight", "fc.weight")) else value
        value = value + 1 if arch == "gemma" and "norm" in name else value
        same = [i for i, other in enumerate(left) if other.shape == value.shape and torch.equal(other, value)]
        assert same, name
        left.pop(same[0])


def test_export_gguf_model_says_what_the_config_says(tmp_path):
    base = save_base(tmp_path / "base", "mistral")
    deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    found, tensors = read(tmp_path / "m.gguf")
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert found["llama.block_count"] == 2
    assert found["llama.embedding_length"] == 32
    assert found["llama.feed_forward_length"] == 40
    assert (found["llama.attention.head_count"], found["llama.attention.head_count_kv"]) == (4, 2)
    assert found["llama.rope.dimension_count"] == 8
    assert found["llama.context_length"] == 6  # the window: beyond it llama.cpp would attend to more
    assert found["llama.vocab_size"] == len(tensors["token_embd.weight"]) == len(tokenizer) + 2
    assert found["tokenizer.ggml.tokens"][:2] == ["<s>", "<|end|>"]
    assert found["tokenizer.ggml.tokens"][-2:] == [f"[PAD{len(tokenizer)}]", f"[PAD{len(tokenizer) + 1}]"]
    assert found["tokenizer.ggml.token_type"][-3:] == [4, 5, 5]  # the added word; rows that no token has
    assert (found["tokenizer.ggml.bos_token_id"], found["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 24.0},
            {"type": "yarn", "factor": 4.0, "original_context_length": 16, "yarn_beta_fast": 24.0},
        ),
    ],
)
def test_export_gguf_model_says_how_positions_are_rescaled(rope, said, tmp_path):
    base = save_base(tmp_path / "base", "llama", rope_parameters={"rope_theta": 5000.0, **rope})
    deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    found, _ = read(tmp_path / "m.gguf")
    assert found["llama.rope.freq_base"] == 5000.0
    assert said.items() <= {k.removeprefix("llama.rope.scaling."): v for k, v in found.items()}.items()


def test_export_gguf_model_divides_frequencies_as_transformers_does_for_llama_3(tmp_path):
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 1000.0}  # fmt: skip
    base = save_base(tmp_path / "base", "llama", rope_parameters=rope, head_dim=32)
    plain = save_base(tmp_path / "plain", "llama", rope_parameters={"rope_theta": 1000.0}, head_dim=32)
    deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    _, tensors = read(tmp_path / "m.gguf")
    wanted = [deltaw.load_base(f).net.model.rotary_emb.inv_freq for f in (plain, base)]
    torch.testing.assert_close(tensors["rope_freqs.weight"], wanted[0] / wanted[1], rtol=1e-5, atol=0)
    assert len(set(tensors["rope_freqs.weight"].tolist())) > 2


def test_export_gguf_model_takes_what_only_weights_can_hold(tmp_path):
    base = save_base(tmp_path / "base", "llama", attention_bias=False, mlp_bias=False)
    dora = noisy(base, deltaw.Dora(rank=3, alpha=5, save_modules=("norm", "lm_head")))
    deltaw.export_gguf(base, tmp_path / "dora.gguf", adapter=dora, merged=True)
    torch.testing.assert_close(read_back(tmp_path / "dora.gguf"), our_logits(base, dora), rtol=0, atol=1e-5)


def test_export_gguf_model_says_what_the_adapter_changes_in_the_settings(tmp_path):
    base = save_base(tmp_path / "base", "llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    adapter = noisy(base, deltaw.LongLora(rank=3, max_positions=160))
    deltaw.export_gguf(base, tmp_path / "m.gguf", adapter=adapter, merged=True)
    found, _ = read(tmp_path / "m.gguf")
    assert (found["llama.context_length"], found["llama.rope.scaling.type"]) == (160, "linear")
    assert (found["llama.rope.scaling.factor"], found["llama.rope.freq_base"]) == (2.5, 5000.0)


def test_export_gguf_model_grows_with_new_tokens(tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    adapter = noisy(base, Lora(rank=3, new_tokens=tuple(f"<new{i}>" for i in range(5))))
    deltaw.export_gguf(base, tmp_path / "m.gguf", adapter=adapter, merged=True)
    found, tensors = read(tmp_path / "m.gguf")
    first = max(adapter.replaced[0].rows) + 1
    assert found["tokenizer.ggml.tokens"][first - 5 :] == [f"<new{i}>" for i in range(5)]
    assert torch.equal(tensors["token_embd.weight"][first - 5 :], adapter.replaced[0].value)
    assert "output.weight" not in tensors


def test_export_gguf_model_unties_where_one_side_changes(tmp_path):
    base = save_base(tmp_path / "base", "qwen2")
    adapter = noisy(base, Lora(rank=3, targets=("lm_head",)))
    deltaw.export_gguf(base, tmp_path / "m.gguf", adapter=adapter, merged=True)
    _, tensors = read(tmp_path / "m.gguf")
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["token_embd.weight"], before)
    assert not torch.equal(tensors["output.weight"], before)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_gguf_model_rounds_matrices_and_no_norms(dtype, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True, dtype=dtype)
    _, tensors = read(tmp_path / "m.gguf")
    before = load_file(base / "model.safetensors")
    wanted = before["model.embed_tokens.weight"].to(getattr(torch, dtype)).float()
    assert torch.equal(tensors["token_embd.weight"], wanted)
    assert torch.equal(tensors["output_norm.weight"], before["model.norm.weight"])
    assert torch.equal(tensors["blk.0.attn_v.bias"], before["model.layers.0.self_attn.v_proj.bias"])


def test_export_gguf_model_is_a_base_again(tmp_path):
    base = save_base(tmp_path / "base", "llama", byte_bpe("gpt-2"), attention_bias=False, mlp_bias=False)
    deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    torch.testing.assert_close(our_logits(tmp_path / "m.gguf"), our_logits(base), rtol=0, atol=1e-5)


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "its hidden_act is 'gelu'; llama.cpp computes silu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rescaled by 'dynamic'"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4, "attention_factor": 1.3,
                             "original_max_position_embeddings": 32}},
        "attention_factor or mscale by hand",
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "layer_types": None},
     "attend to a window"),
    ("qwen3", {"attention_bias": True}, "no tensor for model.layers.0.self_attn.q_proj.bias"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "its attention is scaled in another way"),
    ("gpt2", {"activation_function": "relu"}, "its activation_function is 'relu'; llama.cpp computes gelu_new"),
]  # fmt: skip


@pytest.mark.parametrize(("arch", "config", "said"), REFUSED, ids=[s for _, _, s in REFUSED])
def test_export_gguf_model_refuses_what_llama_cpp_computes_otherwise(arch, config, said, tmp_path):
    base = save_base(tmp_path / "base", arch, **config)
    with pytest.raises(BaseError) as caught:
        deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    assert said in str(caught.value)
    assert "Nothing was written" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_export_gguf_model_names_every_reason_at_once(tmp_path):
    base = save_base(tmp_path / "base", "llama", hidden_act="gelu")
    whole = json.loads((base / "tokenizer.json").read_text())
    whole["normalizer"] = {"type": "Lowercase"}
    whole["pre_tokenizer"] = {"type": "Whitespace"}
    (base / "tokenizer.json").write_text(json.dumps(whole))
    with pytest.raises(BaseError) as caught:
        deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    for said in ("hidden_act", "normalises text", "name in llama.cpp is not known"):
        assert said in str(caught.value)


def test_export_gguf_model_refuses_other_kinds_methods_and_broken_files(tmp_path):
    phi = save_base(tmp_path / "phi", "phi3")
    with pytest.raises(BaseError, match=r"'phi3'[\s\S]*convert_hf_to_gguf.py"):
        deltaw.export_gguf(phi, tmp_path / "m.gguf", merged=True)
    base = save_base(tmp_path / "base", "llama")
    with pytest.raises(NotMergeable, match="prompt"):
        deltaw.export_gguf(base, tmp_path / "m.gguf", adapter=noisy(base, deltaw.Prompt(n_tokens=3)), merged=True)
    (tmp_path / "taken.gguf").write_text("mine")
    with pytest.raises(RunError, match="is there already"):
        deltaw.export_gguf(base, tmp_path / "taken.gguf", merged=True)
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(BaseError, match="truncated"):
        deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    assert not (tmp_path / "m.gguf").exists()


def test_export_gguf_model_refuses_quantised_and_misnamed_files(tmp_path):
    base = save_base(tmp_path / "base", "llama", sentencepiece_bpe())
    path = base / "model.safetensors"
    tensors = load_file(path)
    tensors["extra.q"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"name tensors in another way than its network: model\.layers\.1\.self_attn"):
        deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseError, match="nf4 weights, and an export needs dense ones"):
        deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True)


@pytest.mark.slow
@pytest.mark.starter
def test_export_gguf_model_of_the_starter_is_the_starter_again_bit_for_bit(tmp_path):
    set_cache_dir(None)  # the starter lies in the user's; what is made of it goes to another
    base = resolve_base("smollm2-135m-instruct")
    set_cache_dir(tmp_path / "cache")
    deltaw.export_gguf(base, tmp_path / "m.gguf", merged=True, dtype="float32")
    before = fingerprint_folder(base)
    after = fingerprint_folder(convert_gguf(tmp_path / "m.gguf"))
    assert before.differences(after) == {}
