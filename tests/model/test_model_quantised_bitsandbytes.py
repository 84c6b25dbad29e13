"""Quantised folders go both ways between deltaw and transformers with bitsandbytes, with equal logits."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from deltaw.core import fingerprint
from deltaw.errors import BaseError
from deltaw.merge.quantise import quantise_base
from deltaw.model.base import load_base
from deltaw.model.load import load_transformers
from deltaw.model.quantised import Format, frozen_weights, quantisable
from models import make_ids
from train.tiny_runs import save_base

pytestmark = pytest.mark.parity

IDS = make_ids(2, 11)
ATOL = 5e-5  # float32: sums of at most 136 products in another order, through two blocks; logits up to 20
KINDS = ["llama", "gpt2"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setitem(fingerprint._state, "cache", tmp_path / "cache")


def theirs(folder: Path, **options: object) -> PreTrainedModel:
    """The folder as transformers with bitsandbytes loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **options)


@torch.no_grad()
def their_logits(net: PreTrainedModel) -> torch.Tensor:
    """In eval mode bitsandbytes repacks weights for the CPU, with scales in bfloat16: dropout is off in the config."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return net.train()(input_ids=IDS, use_cache=False).logits


# no dropout; and no row shorter than a block, which bitsandbytes 0.50 dequantises wrongly on the CPU
SETTINGS = {
    "llama": {"attention_dropout": 0.0, "hidden_size": 128, "intermediate_size": 136, "head_dim": 32},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_embd": 128, "n_inner": 136},
}


def dense_base(folder: Path, kind: str) -> Path:
    return save_base(folder, kind=kind, **SETTINGS[kind])


def bnb_config(name: str, double: bool, **more: object) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32, **more,
    )  # fmt: skip


@pytest.mark.parametrize("storage", ["uint8", "bfloat16"])
@pytest.mark.parametrize(("name", "double"), [("nf4", True), ("fp4", False)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_bitsandbytes_is_read(kind, name, double, storage, tmp_path):
    base = dense_base(tmp_path / "dense", kind)
    net = theirs(base, quantization_config=bnb_config(name, double, bnb_4bit_quant_storage=storage))
    net.save_pretrained(tmp_path / "bnb")
    for file in base.glob("tokenizer*"):
        (tmp_path / "bnb" / file.name).write_bytes(file.read_bytes())
    model = load_base(tmp_path / "bnb")
    weights = frozen_weights(model.net)
    assert {(type(w).__name__.lower(), w.block, w.double_quant) for w in weights.values()} == {
        (f"{name}weight", 64, double)
    }
    # the same codes as when deltaw quantises the dense base: nothing of the base was lost on the way
    mine = frozen_weights(load_base(base, format=name, double_quant=double).net)
    assert weights.keys() == mine.keys() == quantisable(model.net).keys()
    for key, weight in mine.items():
        again = dict(weights[key].named_buffers())
        assert all(torch.equal(again[k], t) for k, t in weight.named_buffers()), key
    torch.testing.assert_close(model.logits(IDS), their_logits(net), rtol=0, atol=ATOL)
    assert model.fingerprint.format.startswith(name)


@pytest.mark.parametrize(("name", "double", "block"), [("nf4", True, 64), ("nf4", False, 128), ("fp4", True, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_ours_loads_in_transformers(kind, name, double, block, tmp_path):
    base = dense_base(tmp_path / "dense", kind)
    quantise_base(base, tmp_path / "ours", Format(name, block, double))
    net = theirs(tmp_path / "ours")
    assert {type(net.get_submodule(n)).__name__ for n in quantisable(load_base(base).net)} == {"Linear4bit"}
    model = load_base(tmp_path / "ours")
    torch.testing.assert_close(their_logits(net), model.logits(IDS), rtol=0, atol=ATOL)
    dense = load_base(base).logits(IDS)
    assert float((model.logits(IDS) - dense).abs().max()) > 1e-2


def test_shards_and_untied_heads_load_in_transformers_too(tmp_path):
    base = dense_base(tmp_path / "dense", "llama")
    quantise_base(base, tmp_path / "ours", Format("nf4", 64, True), shard_bytes=10_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    model = load_base(tmp_path / "ours")
    torch.testing.assert_close(their_logits(theirs(tmp_path / "ours")), model.logits(IDS), rtol=0, atol=ATOL)
    assert model.net.lm_head.weight is not model.net.model.embed_tokens.weight


def test_their_eight_bit_folder_is_refused_by_name(tmp_path):
    base = dense_base(tmp_path / "dense", "llama")
    net = theirs(base, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    net.save_pretrained(tmp_path / "bnb")
    assert json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]["load_in_8bit"]
    with pytest.raises(BaseError, match="quantised already, by bitsandbytes 8-bit, which deltaw does not read"):
        load_transformers(tmp_path / "bnb", "float32")


def test_maps_that_bitsandbytes_left_dense_stay_dense(tmp_path):
    base = dense_base(tmp_path / "dense", "llama")
    skipped = ["lm_head", "model.layers.1.mlp.up_proj"]
    net = theirs(base, quantization_config=bnb_config("nf4", False, llm_int8_skip_modules=skipped))
    net.save_pretrained(tmp_path / "bnb")
    mine = load_transformers(tmp_path / "bnb", "float32")
    assert quantisable(mine).keys() - frozen_weights(mine).keys() == {"model.layers.1.mlp.up_proj"}
    torch.testing.assert_close(mine(input_ids=IDS).logits, their_logits(net), rtol=0, atol=ATOL)
