"""extract: a full fine-tune minus its base is an adapter; full rank is the tuned model, a lower one loses the tail."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from made_bases import logits, renamed_base, save_base, stored
from made_deltas import lora_change
from safetensors.torch import load_file, save_file

from deltaw.core.fingerprint import fingerprint_folder
from deltaw.errors import BadInput, BaseError, BaseMismatch, NotMergeable, ShapeError
from deltaw.merge.bake import bake
from deltaw.merge.checkpoint import Checkpoint
from deltaw.merge.extract import extract
from deltaw.model.base import load_base
from deltaw.store.peft import read_adapter
from models import ARCHITECTURES, make_ids, make_net

IDS = make_ids()
# two blocks of float32 sums of 32 to 40 terms; the promise
CLOSE = {"atol": 1e-4, "rtol": 0.0}


def tune(net, only=lambda name: True, seed=9):
    """Noise on every parameter whose name `only` takes."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if only(name):
                value += 0.2 * value.std() * torch.randn(value.shape, generator=rng) if value.numel() > 1 else 0.1
    return net


def pair(saved, kind, only=lambda name: True, **how):
    return saved(make_net(kind), "base", **how), saved(tune(make_net(kind), only), "tuned", **how)


def attached(base, adapter):
    model = load_base(base)
    model.attach(adapter)
    with torch.no_grad():
        return model.logits(IDS)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2", "phi3"])
def test_full_rank_reproduces_the_tuned_model(saved, tmp_path, kind):
    base, tuned = pair(saved, kind)
    report = extract(base, tuned, tmp_path / "out", rank=1000)
    wanted = logits(tuned, IDS)
    torch.testing.assert_close(attached(base, tmp_path / "out"), wanted, **CLOSE)
    assert (wanted - logits(base, IDS)).abs().max() > 0.1
    assert report.error < 1e-12
    assert any("norm" in n or "ln_" in n for n in report.replaced)
    bake(base, tmp_path / "out", tmp_path / "merged", measure=False)
    torch.testing.assert_close(logits(tmp_path / "merged", IDS), wanted, **CLOSE)


@pytest.mark.parametrize("rank", [1, 5, 17])
def test_the_error_is_the_tail_of_the_singular_values(saved, tmp_path, rank):
    base, tuned = pair(saved, "llama")
    report = extract(base, tuned, tmp_path / "out", rank=rank)
    before, after, found = stored(base), stored(tuned), read_adapter(tmp_path / "out")
    total = lost = 0.0
    assert len(report.sites) == 2 * 7 + 1  # the head is a linear map
    for cut in report.sites:
        dense = after[f"{cut.site}.weight"].double() - before[f"{cut.site}.weight"].double()
        S = torch.linalg.svdvals(dense)
        kept = min(rank, len(S))
        assert cut.rank == kept
        assert cut.error == pytest.approx(float(S[kept:].norm() / S.norm()), rel=1e-6, abs=1e-12)
        apart = dense - lora_change(found, cut.site)
        assert float(apart.norm()) == pytest.approx(float(S[kept:].norm()), rel=1e-5, abs=1e-6)
        lost, total = lost + float(S[kept:].square().sum()), total + float(S.square().sum())
    assert report.error == pytest.approx((lost / total) ** 0.5, rel=1e-6, abs=1e-12)


def test_energy_gives_each_map_the_lowest_rank_that_keeps_it(saved, tmp_path):
    base, tuned = pair(saved, "llama", lambda n: "proj.weight" in n)
    report = extract(base, tuned, tmp_path / "out", energy=0.9)
    before, after = stored(base), stored(tuned)
    for cut in report.sites:
        S = torch.linalg.svdvals(after[f"{cut.site}.weight"].double() - before[f"{cut.site}.weight"].double())
        share = S.square().cumsum(0) / S.square().sum()
        assert cut.rank == int((share < 0.9).sum()) + 1
    assert len({c.rank for c in report.sites}) > 1
    assert report.error <= 0.1**0.5
    found = read_adapter(tmp_path / "out")
    assert found.spec.targets == "all-linear"
    assert found.replaced == ()
    assert extract(base, tuned, tmp_path / "low", energy=0.9, rank=2).sites[0].rank == 2


def test_only_what_changed_is_in_the_adapter(saved, tmp_path):
    base, tuned = pair(saved, "llama", lambda n: "layers.1.self_attn.v_proj" in n or n == "model.norm.weight")
    lines = []
    report = extract(base, tuned, tmp_path / "out", rank=4, say=lines.append)
    site = "model.layers.1.self_attn.v_proj"
    assert [c.site for c in report.sites] == [site]
    assert report.replaced == ("model.norm.weight",)
    assert report.biases == (site,)
    assert lines[0].startswith(f"{site}: rank 4, error 0.")
    found = read_adapter(tmp_path / "out")
    assert set(found.sites) == {site}
    assert torch.equal(found.sites[site]["bias"], stored(tuned)[f"{site}.bias"])
    assert found.fingerprint == fingerprint_folder(base)
    assert found.provenance["extract"]["tuned_weights"] == fingerprint_folder(tuned).weights
    assert json.loads(json.dumps(report.as_dict()))["n_parameters"] == found.n_parameters


def test_a_bias_without_its_matrix_and_a_tie_that_was_cut(saved, tmp_path):
    """Biases elsewhere need bias: all; a tied base whose tuned model has a head of its own."""
    net = tune(make_net("qwen2"), lambda n: n.endswith(("k_proj.bias", "q_proj.weight")))
    with torch.no_grad():
        net.lm_head.weight = torch.nn.Parameter(net.lm_head.weight + 0.1)
        net.config.tie_word_embeddings = False
    base, tuned = saved(make_net("qwen2"), "base"), saved(net, "tuned")
    report = extract(base, tuned, tmp_path / "out", rank=1000)
    assert [c.site for c in report.sites if "layers" not in c.site] == ["lm_head"]
    assert "model.embed_tokens.weight" not in report.replaced
    assert read_adapter(tmp_path / "out").spec.bias == "all"
    torch.testing.assert_close(attached(base, tmp_path / "out"), logits(tuned, IDS), **CLOSE)


def test_half_precision_and_shards_are_read_as_they_are_one_tensor_at_a_time(saved, tmp_path, monkeypatch):
    base, tuned = pair(saved, "llama", dtype=torch.bfloat16, shard="20KB")
    assert len(list(base.glob("*.safetensors"))) == 2
    alive: list[weakref.ref] = []

    def read(self, key, own=Checkpoint.stored):
        assert sum(ref() is not None for ref in alive) <= 1  # the base's, while the tuned one is read
        tensor = own(self, key)
        alive.append(weakref.ref(tensor))
        return tensor

    with monkeypatch.context() as watched:
        watched.setattr(Checkpoint, "stored", read)
        extract(base, tuned, tmp_path / "out", rank=1000)
    assert len(alive) == 2 * len(stored(base))
    bake(base, tmp_path / "out", tmp_path / "merged", dtype="float32", measure=False)
    before, after = stored(tuned), stored(tmp_path / "merged")
    for name, value in before.items():
        torch.testing.assert_close(after[name], value.float(), atol=1e-6, rtol=1e-6, msg=name)


def test_files_with_other_names_are_read_through_the_network(tmp_path):
    base = renamed_base(tmp_path / "base")
    tuned = renamed_base(tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name] * 1.5
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    report = extract(base, tuned, tmp_path / "out", rank=1000)
    assert [c.site for c in report.sites] == ["model.layers.1.mlp.up_proj"]
    torch.testing.assert_close(attached(base, tmp_path / "out"), logits(tuned, IDS), **CLOSE)


def test_an_encoder_decoder_is_extracted(tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=53, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0
    )  # fmt: skip
    torch.manual_seed(0)
    first, second = T5ForConditionalGeneration(config).eval(), T5ForConditionalGeneration(config).eval()
    second.load_state_dict(first.state_dict())
    base = save_base(first, tmp_path / "base")
    tuned = save_base(tune(second), tmp_path / "tuned")
    extract(base, tuned, tmp_path / "out", rank=1000)
    model = load_base(base)
    model.attach(tmp_path / "out")
    with torch.no_grad():
        wanted = second(input_ids=IDS, decoder_input_ids=IDS).logits
        found = model.net(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, **CLOSE)


# Refusals ----------------------------------------------------------------------------------------------


def test_the_same_weights_have_no_change(saved, tmp_path):
    base = saved(make_net("llama"))
    with pytest.raises(BadInput, match="hold the same weights: there is no change to extract"):
        extract(base, base, tmp_path / "out", rank=2)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "give the rank"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": 0.0}, "energy"),
    ],
)
def test_settings_that_make_no_sense_are_refused(saved, tmp_path, settings, match):
    base, tuned = pair(saved, "llama")
    with pytest.raises(BadInput, match=match):
        extract(base, tuned, tmp_path / "out", **settings)


def test_another_architecture_and_a_grown_vocabulary_are_refused(saved, tmp_path):
    base = saved(make_net("llama"))
    other = saved(make_net("llama", num_hidden_layers=1), "other")
    with pytest.raises(BaseMismatch, match=r"(?s)is no fine-tune of.*architecture: base has llama/"):
        extract(base, other, tmp_path / "out", rank=2)
    net = tune(make_net("llama"))
    net.resize_token_embeddings(60)
    with pytest.raises((BaseMismatch, ShapeError), match=r"architecture|vocabulary"):
        extract(base, saved(net, "grown"), tmp_path / "out", rank=2)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_nan_in_the_tuned_model_is_refused(saved, tmp_path, name):
    net = tune(make_net("llama"))
    with torch.no_grad():
        net.get_parameter(name).view(-1)[3] = float("nan")
    base, tuned = saved(make_net("llama")), saved(net, "tuned")
    with pytest.raises(BaseError, match=f"holds NaN or infinity in {name}"):
        extract(base, tuned, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_a_change_without_a_linear_map_has_no_place(saved, tmp_path):
    base, tuned = pair(saved, "llama", lambda n: n == "model.norm.weight")
    with pytest.raises(BadInput, match="No linear map and no bias of one changes"):
        extract(base, tuned, tmp_path / "out", rank=2)


def test_quantised_models_are_refused(saved, tmp_path):
    from deltaw.merge.quantise import quantise_base
    from deltaw.model.quantised import Format

    base, tuned = pair(saved, "llama")
    quantise_base(base, tmp_path / "small", Format("nf4", 32, False))
    with pytest.raises(NotMergeable, match="holds nf4 weights"):
        extract(tmp_path / "small", tuned, tmp_path / "out", rank=2)


def test_an_adapter_s_folder_is_no_model(saved, tmp_path):
    base, tuned = pair(saved, "llama")
    extract(base, tuned, tmp_path / "lora", rank=2)
    for models in ((base, tmp_path / "lora"), (tmp_path / "lora", tuned)):
        with pytest.raises(BaseError, match=r"lora has no config\.json"):
            extract(*models, tmp_path / "out", rank=2)
