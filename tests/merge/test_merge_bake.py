"""bake: the merged folder computes what base + adapter computes, and holds nothing else."""

from __future__ import annotations

import json

import pytest
import torch
from made_bases import (
    TEXT,
    attached_logits,
    config,
    logits,
    noisy,
    oracle,
    plain,
    rename,
    renamed_base,
    save_base,
    stored,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from deltaw.errors import BadInput
from deltaw.merge.bake import bake
from deltaw.merge.checkpoint import Planned, write_shards
from deltaw.methods.lora import Lora
from deltaw.model.base import load_base
from models import ARCHITECTURES, EMBEDDING, make_ids, make_net

IDS = make_ids()
# float32: about 1e-6 a layer after two layers of sums of 32 to 40 terms; the promise is 1e-4
CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2"])
def test_merged_logits_equal_the_attached_models(saved, tmp_path, kind):
    base = saved(make_net(kind))
    adapter = noisy(base, Lora(rank=3, alpha=5, bias="all"))

    report = bake(base, adapter, tmp_path / "out", text=TEXT)

    wanted = attached_logits(base, adapter, IDS)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), wanted, **CLOSE)
    assert report.probe.logit_max < 1e-4
    assert report.probe.top1 == 1.0
    assert report.probe.kind == "text"
    assert report.route == "shards"
    apart = (wanted - logits(base, IDS)).abs().max()
    assert apart > 0.1  # the adapter does something


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi"])
def test_each_written_tensor_equals_the_formula(saved, tmp_path, kind):
    base = saved(make_net(kind))
    adapter = noisy(base, Lora(rank=3, alpha=5, bias="all"))
    kinds = {p.name: p.kind for p in adapter.places}
    assert ("conv1d" in kinds.values()) == (kind == "gpt2")

    bake(base, adapter, tmp_path / "out", measure=False)

    found, wanted = stored(tmp_path / "out"), oracle(base, adapter, kinds)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-6, msg=name)


def test_untouched_tensors_are_the_bases_bits(saved, tmp_path):
    base = saved(make_net("llama"))
    bake(base, noisy(base, Lora(rank=3, alpha=5, targets=("q_proj",))), tmp_path / "out", measure=False)
    before, after = stored(base), stored(tmp_path / "out")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_the_folder_is_plain(saved, tmp_path):
    base = saved(make_net("llama"))
    (base / "deltaw_base.json").write_text('{"name": "x"}')
    (base / "LICENSE").write_text("Apache")
    bake(base, noisy(base), tmp_path / "out", measure=False)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "LICENSE",
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template
    assert tokenizer("w5 w9")["input_ids"] == [5, 9]
    assert not any(b"deltaw" in p.read_bytes() for p in (tmp_path / "out").iterdir())


def test_rslora_and_patterns_are_merged_with_their_own_scales(saved, tmp_path):
    base = saved(make_net("llama"))
    spec = Lora(
        rank=3, alpha=5, rslora=True, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 7},
        alpha_pattern={"down_proj": 11},
    )  # fmt: skip
    adapter = noisy(base, spec)
    bake(base, adapter, tmp_path / "out", measure=False)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sharded_checkpoints_are_read_and_written_in_shards(saved, tmp_path, kind):
    base = saved(make_net(kind), shard="20KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    adapter = noisy(base)
    report = bake(base, adapter, tmp_path / "out", text=TEXT, shard_bytes=12_000)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    assert all(len(load_file(p)) == 1 or p.stat().st_size < 14_000 for p in shards)
    assert report.size_bytes == sum(p.stat().st_size for p in shards)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


def test_no_more_than_one_shard_is_made_before_it_is_written(tmp_path, monkeypatch):
    made, written = [], []

    def values():
        for i in range(7):
            made.append(i)
            yield f"t{i}", torch.full((5,), float(i))

    def save(tensors, path, metadata):
        assert len(made) == sum(written) + len(tensors)
        written.append(len(tensors))
        save_file(tensors, path, metadata)

    monkeypatch.setattr("deltaw.merge.checkpoint.save_file", save)
    write_shards(tmp_path, [Planned(f"t{i}", 20) for i in range(7)], values(), shard_bytes=50)
    assert written == [2, 2, 2, 1]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 140
    assert index["weight_map"]["t6"] == "model-00004-of-00004.safetensors"
    assert stored(tmp_path)["t5"].tolist() == [5.0] * 5


def test_a_saved_adapter_folder_is_merged(saved, tmp_path):
    base = saved(make_net("llama"))
    adapter = noisy(base)
    adapter.save(tmp_path / "adapter")
    report = bake(str(base), str(tmp_path / "adapter"), str(tmp_path / "out"), text=TEXT)
    assert report.adapter == adapter.id
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


# Dtypes ------------------------------------------------------------------------------------------------


def test_a_bfloat16_checkpoint_stays_bfloat16_and_is_summed_in_float32(saved, tmp_path):
    base = saved(make_net("llama"), dtype=torch.bfloat16)
    adapter = noisy(base)
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    found = stored(tmp_path / "out")
    wanted = oracle(base, adapter, {p.name: p.kind for p in adapter.places})
    for name, value in wanted.items():
        # one rounding from the exact sum (half a unit in the last place, 2^-9), and float32's own error
        torch.testing.assert_close(found[name].double(), value, rtol=2**-8, atol=1e-6, msg=name)
        assert found[name].dtype == torch.bfloat16
    assert report.dtype == config(tmp_path / "out")["dtype"] == "bfloat16"
    assert plain(tmp_path / "out").dtype == torch.bfloat16
    assert 0 < report.probe.logit_mean < 0.1
    assert report.probe.logit_mean < report.probe.logit_max


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_asked_dtype_is_written(saved, tmp_path, dtype):
    base = saved(make_net("llama"))
    adapter = noisy(base)
    report = bake(base, adapter, tmp_path / "out", dtype=dtype, text=TEXT)
    assert {str(t.dtype) for t in stored(tmp_path / "out").values()} == {f"torch.{dtype}"}
    assert config(tmp_path / "out")["dtype"] == dtype == report.dtype
    assert report.probe.logit_max < {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.05}[dtype]


def test_float32_out_of_a_bfloat16_base_is_exact(saved, tmp_path):
    base = saved(make_net("llama"), dtype=torch.bfloat16)
    adapter = noisy(base)
    report = bake(base, adapter, tmp_path / "out", dtype="float32", text=TEXT)
    assert report.probe.logit_max < 1e-4
    assert report.lost_share == 0


def test_the_report_counts_changes_that_bfloat16_swallows(saved, tmp_path):
    base = saved(make_net("llama"), dtype=torch.bfloat16)
    small = noisy(base, Lora(rank=3, alpha=5, targets=("q_proj",)))
    for params in small.sites.values():
        params["B"].mul_(1e-3)
    report = bake(base, small, tmp_path / "out", measure=False)
    before, after = stored(base), stored(tmp_path / "out")
    kept = lost = 0
    largest = 0.0
    for site, params in small.sites.items():
        w = before[f"{site}.weight"].float()
        moved = torch.addmm(w, params["B"], params["A"], alpha=5 / 3)
        changed = moved != w
        same = before[f"{site}.weight"] == after[f"{site}.weight"]
        lost += int((changed & same).sum())
        kept += int((changed & ~same).sum())
        largest = max(largest, float((moved - w).abs().max()))
    assert report.n_weights_changed == lost + kept
    assert report.lost_share == pytest.approx(lost / (lost + kept))
    assert 0.1 < report.lost_share < 1
    assert report.largest_change == pytest.approx(largest, abs=1e-7)


# Ties, rows, saved modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "gpt2", "gemma"])
@pytest.mark.parametrize("side", ["head", "embedding"])
def test_merging_on_one_side_of_a_tie_unties(saved, tmp_path, kind, side):
    base = saved(make_net(kind))
    assert "lm_head.weight" not in stored(base)
    role = "lm_head" if side == "head" else EMBEDDING.get(kind, "embed_tokens")
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=(role,)))

    report = bake(base, adapter, tmp_path / "out", text=TEXT)

    assert report.untied
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    before, after = stored(base), stored(tmp_path / "out")
    assert set(after) == {*before, "lm_head.weight"}
    (embedding,) = [k for k in before if k.endswith(EMBEDDING.get(kind, "embed_tokens") + ".weight")]
    same = embedding if side == "head" else "lm_head.weight"
    assert torch.equal(after[same], before[embedding])
    assert not torch.equal(after["lm_head.weight"], after[embedding])
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


def test_merging_on_both_sides_of_a_tie_writes_both(saved, tmp_path):
    base = saved(make_net("qwen2"))
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=("lm_head", "embed_tokens", "q_proj")))
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    assert report.untied
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


def test_a_tie_that_is_not_touched_stays(saved, tmp_path):
    base = saved(make_net("qwen2"))
    report = bake(base, noisy(base), tmp_path / "out", text=TEXT)
    assert not report.untied
    assert config(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in stored(tmp_path / "out")


def test_a_tied_checkpoint_that_holds_both_tensors_is_untied_right(saved, tmp_path):
    base = saved(make_net("qwen2"))
    path = base / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path, {"format": "pt"})
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=("lm_head",)))
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    assert report.untied
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


def test_a_config_that_ties_what_the_files_hold_apart_is_put_right(saved, tmp_path):
    base = saved(make_net("llama"))
    path = base / "config.json"
    path.write_text(json.dumps(config(base) | {"tie_word_embeddings": True}))
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=("embed_tokens", "q_proj")))
    bake(base, adapter, tmp_path / "out", text=TEXT)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False
    assert torch.equal(stored(tmp_path / "out")["lm_head.weight"], stored(base)["lm_head.weight"])
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "phi"])
def test_new_tokens_grow_embedding_head_and_tokenizer(saved, tmp_path, kind):
    base = saved(make_net(kind))
    adapter = noisy(base, Lora(rank=3, alpha=5, new_tokens=("<call>", "<end>")))

    report = bake(base, adapter, tmp_path / "out", text=TEXT)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    call, end = tokenizer.convert_tokens_to_ids(["<call>", "<end>"])
    # transformers' Qwen2 tokenizer adds a token of its own: a row in between that the base does not have
    assert (call, end) == ((54, 55) if kind == "qwen2" else (53, 54))
    assert tokenizer.chat_template
    out = config(tmp_path / "out")
    assert out["vocab_size"] == end + 1
    assert out.get("tie_word_embeddings", True) is (kind in ("qwen2", "gpt2"))
    ids = torch.tensor([[3, call, 4, end, end, 9]])
    found = logits(tmp_path / "out", ids)
    assert found.shape[-1] == end + 1
    if kind == "qwen2":
        mean = attached_logits(base, adapter, ids)[..., :53].mean(-1)
        torch.testing.assert_close(found[..., 53], mean, **CLOSE)
        found[..., 53] = -torch.inf
    torch.testing.assert_close(found, attached_logits(base, adapter, ids), **CLOSE)
    assert report.probe.logit_max < 1e-4
    assert report.new_tokens == ("<call>", "<end>")


def test_new_tokens_and_a_change_of_the_head_untie(saved, tmp_path):
    base = saved(make_net("qwen2"))
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=("lm_head", "q_proj"), new_tokens=("<call>",)))
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    assert report.untied
    ids = torch.tensor([[3, 54, 4, 54, 9]])
    found = logits(tmp_path / "out", ids)
    found[..., 53] = -torch.inf
    torch.testing.assert_close(found, attached_logits(base, adapter, ids), **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens", "norm"])
def test_saved_modules_are_written(saved, tmp_path, kind, module):
    base = saved(make_net(kind))
    adapter = noisy(base, Lora(rank=3, alpha=5, save_modules=(module,)))
    assert adapter.replaced
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    assert report.untied == (kind == "qwen2" and module != "norm")
    found = stored(tmp_path / "out")
    for r in adapter.replaced:
        assert torch.equal(found[r.tensor], r.value)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


# Names in the files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["all-linear", ("lm_head", "c_attn")])
def test_an_old_gpt2_checkpoint_without_the_prefix(saved, tmp_path, targets):
    base = rename(saved(make_net("gpt2")), lambda k: k.removeprefix("transformer."))
    assert "wte.weight" in stored(base)
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=targets, bias="all"))
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    assert report.route == "shards"
    assert "h.0.attn.c_attn.weight" in stored(tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ("lm_head", "q_proj")])
@pytest.mark.parametrize("tokens", [(), ("<call>",)])
def test_names_that_transformers_changes_on_load_take_the_way_through_memory(tmp_path, tie, targets, tokens):
    base = renamed_base(tmp_path / "base", tie)
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=targets, new_tokens=tokens))
    said = []
    report = bake(base, adapter, tmp_path / "out", dtype="float32", text=TEXT, say=said.append)
    assert report.route == "loaded"
    assert any("loading the whole model" in line for line in said)
    assert report.untied == (tie and "lm_head" in targets)
    ids = torch.tensor([[3, 53, 4, 9]]) if tokens else IDS
    torch.testing.assert_close(logits(tmp_path / "out", ids), attached_logits(base, adapter, ids), **CLOSE)


def test_attention_of_a_mixture_of_experts_is_merged_and_its_experts_pass(tmp_path):
    config = MixtralConfig(
        vocab_size=53, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = save_base(MixtralForCausalLM(config), tmp_path / "base")
    adapter = noisy(base, Lora(rank=3, alpha=5, targets=("q_proj", "o_proj")))
    report = bake(base, adapter, tmp_path / "out", text=TEXT)
    assert report.route == "shards"
    before, after = stored(base), stored(tmp_path / "out")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == 4
    assert any("experts.2.w1" in k for k in before)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached_logits(base, adapter, IDS), **CLOSE)


def test_a_base_without_a_tokenizer_is_probed_with_bytes(saved, tmp_path):
    base = saved(make_net("llama"))
    adapter = noisy(base)
    for path in base.glob("*token*"):
        path.unlink()
    report = bake(base, adapter, tmp_path / "out")
    assert report.probe.kind == "bytes"
    assert report.probe.n_tokens == 64  # the base's longest context
    assert report.probe.logit_max < 1e-4


def test_a_tokenizer_that_knows_no_word_of_the_text_is_probed_with_bytes(saved, tmp_path):
    base = saved(make_net("llama"))
    signs = Tokenizer(BPE({"\u2654": 0, "\u2655": 1, "\u2656": 2}, []))  # leaves out what it does not know
    PreTrainedTokenizerFast(tokenizer_object=signs, eos_token="\u2656").save_pretrained(base)
    report = bake(base, noisy(base, Lora(rank=3)), tmp_path / "out")
    assert report.probe.kind == "bytes"
    assert report.probe.n_tokens > 1
    with pytest.raises(BadInput, match="text to compare logits on is empty"):
        bake(base, noisy(base, Lora(rank=3)), tmp_path / "other", text="")
    assert not (tmp_path / "other").exists()


def test_the_base_is_not_changed(saved, tmp_path):
    base = saved(make_net("qwen2"))
    before = {p.name: p.read_bytes() for p in base.iterdir()}
    adapter = noisy(base)
    was = adapter.id
    bake(base, adapter, tmp_path / "out", text=TEXT)
    assert {p.name: p.read_bytes() for p in base.iterdir()} == before
    assert adapter.id == was
    assert load_base(base).fingerprint.weights != load_base(tmp_path / "out").fingerprint.weights


def test_falcons_own_class_of_linear_maps_trains_and_merges(tmp_path):
    config = FalconConfig(vocab_size=53, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(2)
    base = save_base(FalconForCausalLM(config), tmp_path / "base")
    adapter = noisy(base)
    assert {p.role for p in adapter.places} == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    bake(base, adapter, tmp_path / "out")
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    wanted = attached_logits(base, adapter, ids)
    torch.testing.assert_close(logits(tmp_path / "out", ids), wanted, rtol=0, atol=1e-4)  # the promise for float32
