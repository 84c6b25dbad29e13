"""LongLoRA: groups that stay inside documents, in training only; positions rescaled while it is in use."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from deltaw import LongLora, Lora
from deltaw.core.fingerprint import set_cache_dir
from deltaw.data.template import Example
from deltaw.errors import AdapterError, SpecError
from deltaw.merge.bake import bake
from deltaw.model.attention import Documents, document_attention
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.shift import shifted_documents
from deltaw.store.peft import write_adapter
from deltaw.train.loss import sft
from deltaw.train.step import mean_loss, step_gradient
from models import make_ids, make_net, randomise
from train.tiny_runs import plain_transformers, save_base

IDS = make_ids()
ATOL = 1e-5  # float32 sums in another order


@pytest.fixture(autouse=True)
def cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spec: LongLora) -> Tensor:
    """Head by head and token by token: who sees whom, from the paper's words."""
    heads, tokens, dim = q.shape
    out = torch.zeros_like(q)
    for h in range(heads):
        shared = h * k.shape[0] // heads
        is_moved = shared >= k.shape[0] // 2 if k.shape[0] > 1 else h >= heads // 2
        start = 0
        for n in lengths:
            found = spec.groups(n)
            for t in range(n):
                group = lambda i: 0 if found is None else (i + (found.size - found.shift) * is_moved) // found.size  # noqa: E731, B023
                seen = [start + i for i in range(t + 1) if group(i) == group(t)]
                scores = torch.stack([q[h, start + t] @ k[shared, i] for i in seen]) * dim**-0.5
                out[h, start + t] = sum(p * v[shared, i] for p, i in zip(scores.softmax(0), seen, strict=True))
            start += n
    assert start == tokens
    return out


@pytest.mark.parametrize(("heads", "shared"), [(4, 4), (6, 2), (9, 3), (4, 1)])
def test_groups_stay_inside_documents_and_half_of_the_heads_are_moved(heads, shared):
    spec = LongLora(group_share=0.25, group_least=5)
    lengths = [23, 4, 40, 7]
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(n, sum(lengths), 6, generator=rng) for n in (heads, shared, shared))
    bounds = torch.tensor([0, 23, 27, 67, 74])
    groups = shifted_documents(bounds, spec.groups)
    found, _ = document_attention(
        SimpleNamespace(), q[None], k[None], v[None], None, documents=Documents.of(bounds), shifted=groups
    )
    wanted = oracle(q, k, v, lengths, spec)
    torch.testing.assert_close(found[0].transpose(0, 1), wanted, rtol=0, atol=ATOL)
    whole, _ = document_attention(SimpleNamespace(), q[None], k[None], v[None], None, documents=Documents.of(bounds))
    assert float((whole - found).abs().max()) > 0.1


def test_documents_up_to_the_least_group_are_whole():
    assert LongLora(group_least=16).groups(16) is None
    assert LongLora(group_least=16).groups(17).size == 16
    assert LongLora(group_share=0.25, group_least=4).groups(40).size == 10
    assert shifted_documents(torch.tensor([0, 16, 20]), LongLora(group_least=16).groups) is None


def test_attention_is_cut_in_training_only():
    rows = [Example(tuple(range(3, 43)), (False,) + (True,) * 39, "long")]
    losses = {}
    for share in (1.0, 0.25):
        model = Model(make_net("llama"))
        model.attach(LongLora(rank=3, alpha=5, group_share=share, group_least=5))
        randomise(model, size=0.1)
        trained, _, _ = step_gradient(model, rows, sft)
        losses[share] = (trained, mean_loss(model, rows, sft))
    assert losses[1.0][0] == pytest.approx(losses[1.0][1], abs=1e-5)
    assert losses[0.25][1] == pytest.approx(losses[1.0][1], abs=1e-6)
    assert abs(losses[0.25][0] - losses[1.0][0]) > 1e-3
    wide = Model(make_net("opt"))
    wide.attach(LongLora(rank=3, group_least=5, save_modules=("layer_norm",)))
    step_gradient(wide, rows, sft)  # positions of another kind do not matter to groups


@pytest.mark.parametrize("rope", ["linear", "yarn"])
def test_positions_are_rescaled_while_it_is_in_use(rope):
    model = Model(make_net("llama"))
    base, own = model.logits(IDS), model.net.config.to_dict()
    modules = [(n, id(m)) for n, m in model.net.named_modules()]
    model.attach(LongLora(rank=3, max_positions=256, rope=rope))
    other = make_net("llama")
    rescaled = {"rope_theta": 10000.0, "rope_type": rope, "factor": 4.0}
    rescaled |= {"original_max_position_embeddings": 64} if rope == "yarn" else {}
    other.config.rope_parameters, other.config.max_position_embeddings = rescaled, 256
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)
    with torch.no_grad():
        wanted = other(input_ids=IDS).logits
    torch.testing.assert_close(model.logits(IDS), wanted, rtol=0, atol=ATOL)
    assert float((wanted - base).abs().max()) > 1e-3
    model.use(None)
    assert torch.equal(model.logits(IDS), base)
    model.attach(Lora(rank=3), name="plain")
    with pytest.raises(AdapterError, match="other positions of the base"):
        model.use({"default": 1.0, "plain": 1.0})
    model.detach()
    assert torch.equal(model.logits(IDS), base)
    assert model.net.config.to_dict() == own
    assert [(n, id(m)) for n, m in model.net.named_modules()] == modules


def test_the_merged_folder_reads_longer_documents_by_itself(tmp_path):
    folder = save_base(tmp_path / "base")
    model = load_base(folder)
    model.attach(LongLora(rank=3, alpha=5, max_positions=128))
    randomise(model, size=0.1)
    adapter = model.adapter()
    assert adapter.overrides["max_position_embeddings"] == 128
    report = bake(folder, adapter, tmp_path / "out")
    assert report.probe.logit_max < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["max_position_embeddings"] == 128
    assert config["rope_parameters"]["factor"] == 2.0
    ids = make_ids(1, 100)
    with torch.no_grad():
        found = plain_transformers(tmp_path / "out", dtype=torch.float32)(input_ids=ids).logits
        torch.testing.assert_close(found, model.logits(ids), rtol=0, atol=1e-4)


def test_peft_computes_the_same_when_its_config_says_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    model = Model(make_net("llama"))
    model.attach(LongLora(rank=3, alpha=5, max_positions=256))
    randomise(model, size=0.1)
    write_adapter(model.adapter(), tmp_path / "a")
    other = make_net("llama")
    for key, value in model.adapters["default"].overrides.items():
        setattr(other.config, key, value)
    other.model.rotary_emb = type(other.model.rotary_emb)(other.config)
    theirs = peft.PeftModel.from_pretrained(other, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, model.logits(IDS), rtol=ATOL, atol=ATOL)


def test_what_cannot_be_rescaled_is_refused_and_leaves_no_trace():
    gpt2 = Model(make_net("gpt2"))
    with pytest.raises(SpecError, match="rotary positions, and gpt2 has none"):
        gpt2.attach(LongLora(rank=3, save_modules=("ln_1",), max_positions=128))
    llama = Model(make_net("llama"))
    with pytest.raises(SpecError, match="the base reads 64"):
        llama.attach(LongLora(rank=3, max_positions=64))
    rescaled = make_net("llama")
    rescaled.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(SpecError, match="rescaled already"):
        Model(rescaled).attach(LongLora(rank=3, max_positions=256))
    assert llama.adapters == {}
    assert gpt2.adapters == {}
