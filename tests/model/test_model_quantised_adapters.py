"""Adapters on a quantised base: what trains, what is refused, and what goes over to the dense base and back."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from deltaw import Full, Lora
from deltaw.core import fingerprint
from deltaw.errors import AdapterError, BaseError, TargetError
from deltaw.formats import BlockwiseWeight
from deltaw.model.base import load_base
from deltaw.model.identity import OtherBaseWarning
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from models import dense_logits, make_ids, make_net, randomise
from train.tiny_runs import save_base

IDS = make_ids()
ATOL = 1e-5  # float32 sums through two blocks in another order; logits of order 1


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(fingerprint._state, "cache", tmp_path / "cache")
    return save_base(tmp_path / "tiny")


def quantised(kind: str = "llama", name: str = "nf4", double_quant: bool = True) -> Model:
    return Model(quantise_network(make_net(kind), Format(name, 64, double_quant)))


def dense_copy(kind: str, model: Model):
    """The network with the dequantised weights in plain modules."""
    dense = make_net(kind)
    with torch.no_grad():
        for name, weight in model.places.weights.items():
            if not isinstance(weight, BlockwiseWeight):
                continue
            module = dense.get_submodule(name)
            module.weight.copy_(weight.dense().T if isinstance(module, Conv1D) else weight.dense())
    return dense


def test_full_training_is_refused_and_changes_nothing():
    model = quantised()
    before = model.logits(IDS)
    with pytest.raises(AdapterError, match="a base in nf4 is only read"):
        model.attach(Full())
    assert model.adapters == {}
    assert not any(p.requires_grad for p in model.net.parameters())
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.parametrize("saved", ["q_proj", "mlp", "layers.0", "0"])
def test_save_modules_of_a_quantised_map_is_refused_by_name(saved):
    model = quantised()
    before = model.logits(IDS)
    with pytest.raises(
        TargetError, match=r"save_modules names model\.layers\.0.*weight is quantised and only read\.\n.*dense"
    ):
        model.attach(Lora(rank=3, targets=["k_proj"], save_modules=[saved]))
    assert model.adapters == {}
    assert torch.equal(model.logits(IDS), before)


def test_an_adapter_that_replaces_a_quantised_map_is_refused():
    dense = Model(make_net("llama"))
    dense.attach(Lora(rank=3, alpha=5, targets=["q_proj"], save_modules=["up_proj"]))
    model = quantised()
    with pytest.raises(AdapterError, match=r"up_proj.weight is quantised and only read"):
        model.attach(dense.adapter())
    assert model.adapters == {}


@pytest.mark.parametrize("saved", [["norm"], ["lm_head"], ["embed_tokens"], ["input_layernorm", "lm_head"]], ids=str)
def test_save_modules_of_what_stays_dense_trains(saved):
    model = quantised()
    spec = Lora(rank=3, alpha=5, targets=["q_proj", "down_proj"], save_modules=saved, bias="all")
    model.attach(spec)
    randomise(model)
    model.logits(IDS).square().mean().backward()
    trainable = model.trainable()
    replaced = {k for k in trainable if k.startswith("replace:")}
    assert {name.removeprefix("replace:").split(".")[-2] for name in replaced} >= set(saved)
    assert all(t.grad is not None and bool(t.grad.any()) for t in trainable.values())
    wanted = dense_logits(dense_copy("llama", model), model, {"default": 1.0}, IDS)
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=ATOL, atol=3 * ATOL)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
@pytest.mark.parametrize("weights", [{"one": 1.0, "two": 1.0}, {"one": 0.3, "two": -0.7}, {"two": 0.5}], ids=str)
def test_a_weighted_set_is_the_quantised_base_plus_the_sum(kind, weights):
    model = quantised(kind, "int4", False)
    model.attach(Lora(rank=3, alpha=5, bias="lora_only"), name="one")
    model.attach(Lora(rank=2, alpha=7, layers=[1]), name="two")
    randomise(model, "one", seed=1)
    randomise(model, "two", seed=2)
    model.use(weights)
    wanted = dense_logits(dense_copy(kind, model), model, weights, IDS)
    most = float(wanted.abs().max())
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=ATOL * max(1.0, most))


def test_new_tokens_train_on_a_quantised_base(base):
    model, dense = (load_base(base, format=f) for f in ("nf4", "dense"))
    before = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5, new_tokens=["<sql>"]))
    new = model.tokenizer.convert_tokens_to_ids("<sql>")
    ids = IDS.clone()
    ids[:, 4] = new
    assert new == dense.net.config.vocab_size
    logits = model.logits(ids)
    assert logits.shape[-1] == new + 1
    logits.square().mean().backward()
    rows = {k: t for k, t in model.trainable().items() if k.startswith("rows:")}
    assert len(rows) == 2
    assert all(bool(t.grad.any()) for t in rows.values())
    adapter = model.adapter()
    again = load_base(base, format="nf4")
    again.attach(adapter)
    assert torch.equal(again.logits(ids), logits)
    model.detach()
    assert torch.equal(model.logits(IDS), before)


@pytest.mark.parametrize(("trained_on", "used_on"), [("nf4", "dense"), ("dense", "nf4"), ("int8", "nf4")])
def test_an_adapter_goes_over_to_another_format_with_one_warning(base, tmp_path, trained_on, used_on):
    first, second = load_base(base, format=trained_on), load_base(base, format=used_on)
    first.attach(Lora(rank=3, alpha=5))
    randomise(first)
    first.adapter().save(tmp_path / "adapter")
    with pytest.warns(OtherBaseWarning) as caught:
        second.attach(tmp_path / "adapter")
    assert [str(w.message) for w in caught] == [
        f"The base differs from the adapter's:\n  format: adapter has {trained_on}, this model has {used_on}"
    ]
    made, given = first.adapter().tensors(), second.adapter().tensors()
    assert made.keys() == given.keys()
    assert all(torch.equal(given[k], t) for k, t in made.items())
    if used_on == "dense":
        wanted = dense_logits(load_base(base).net, second, {"default": 1.0}, IDS)
        torch.testing.assert_close(second.logits(IDS).detach(), wanted, rtol=ATOL, atol=5 * ATOL)
    assert not torch.equal(first.logits(IDS), second.logits(IDS))


def test_an_adapter_on_the_same_format_says_nothing(base, tmp_path):
    first = load_base(base, format="nf4", double_quant=True, block=128)
    first.attach(Lora(rank=3, alpha=5))
    randomise(first)
    first.adapter().save(tmp_path / "adapter")
    second = load_base(base, format="nf4", double_quant=True, block=128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.attach(tmp_path / "adapter")
    assert torch.equal(second.logits(IDS), first.logits(IDS))


def test_formats_and_settings_that_do_not_fit_are_refused(base):
    with pytest.raises(BaseError, match=r"Unknown format 'nf5'\. Did you mean 'nf4'"):
        load_base(base, format="nf5")
    for settings in ({"double_quant": True}, {"block": 128}):
        with pytest.raises(BaseError, match="belong to a quantised format: pass format='nf4'"):
            load_base(base, **settings)
    with pytest.raises(BaseError, match="a block of 48 values is not possible"):
        load_base(base, format="nf4", block=48)
