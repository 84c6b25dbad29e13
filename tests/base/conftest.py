"""Tiny random models, tokenizers and GGUF files, made in code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaw.core.fingerprint import set_cache_dir

SPECIAL = ["<unk>", "<s>", "</s>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("a", "b"), ("\u0120", "\u0120"), ("1", "2")]
VOCAB = {t: i for i, t in enumerate([*SPECIAL, *ALPHABET, *("".join(m) for m in MERGES)])}
LLAMA = {
    "vocab_size": 264, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


@pytest.fixture(autouse=True)
def cache(request, tmp_path_factory):
    """A cache of its own for each test, but for those that use the real starter."""
    folder = None if request.node.get_closest_marker("starter") else tmp_path_factory.mktemp("cache")
    set_cache_dir(folder)
    yield folder
    set_cache_dir(None)


def make_tokenizer(**more_vocab: int) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocab={**VOCAB, **more_vocab}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHATML, **names)


def make_llama(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))


def save_base(folder: Path, model=None, shard: str = "1GB") -> Path:
    (model or make_llama()).save_pretrained(folder, max_shard_size=shard)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return save_base(tmp_path / "base")


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> Path:
    """`model` as llama.cpp's converter writes it, in float32."""
    config, state = model.config, model.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = sorted(VOCAB, key=VOCAB.__getitem__)
    tokens += [f"<x{i}>" for i in range(len(tokens), config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in SPECIAL else 1 for t in tokens])
    writer.add_token_merges([" ".join(m) for m in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        stem = name.removesuffix(".weight")
        data = tensor.numpy()
        if stem in top:
            writer.add_tensor(f"{top[stem]}.weight", data)
            continue
        _, _, layer, part = stem.split(".", 3)
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }
        if part in heads:  # llama.cpp interleaves the two halves of a rotary pair
            h = heads[part]
            data = data.reshape(h, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(f"blk.{layer}.{names[part]}.weight", np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def make():
    """The makers above, for test modules."""

    class Makers:
        llama = staticmethod(make_llama)
        tokenizer = staticmethod(make_tokenizer)
        save = staticmethod(save_base)
        gguf = staticmethod(write_gguf)

    return Makers
