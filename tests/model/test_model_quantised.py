"""A quantised base computes with its dequantised weights, wherever they came from, and adapters train on it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaw import Lora
from deltaw.model.load import load_transformers
from deltaw.model.model import Model
from deltaw.model.quantised import Format, frozen_weights, quantise_network
from models import make_batch, make_ids, make_net, randomise

IDS = make_ids()
BATCH = make_batch([make_ids(1, n, seed=n)[0] for n in (7, 12, 4)])
ATOL = 1e-5  # sums of at most 40 float32 products in another order, through two blocks; logits of order 1
# every architecture, format and kind of scale, most of them twice; not every pair
PAIRS = [
    ("llama", Format("nf4", 64, True)),
    ("llama", Format("int8", 32, False)),
    ("mistral", Format("fp4", 32, True)),
    ("qwen2", Format("int4", 64, False)),
    ("qwen2", Format("nf4", 4096, True)),
    ("gemma", Format("int8", 256, True)),
    ("gemma", Format("fp4", 64, False)),
    ("phi", Format("nf4", 32, False)),
    ("gpt2", Format("int4", 128, True)),
    ("gpt2", Format("nf4", 64, True)),
    ("opt", Format("int8", 64, True)),
    ("opt", Format("fp4", 4096, False)),
    ("gpt_neox", Format("nf4", 128, False)),
    ("gpt_neox", Format("int4", 32, True)),
    ("gemma2", Format("nf4", 64, False)),
]


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}")
def pair(request) -> tuple[str, Format]:
    return request.param


def linear_maps(net: PreTrainedModel) -> list[str]:
    """The base's linear maps by path, the head left out: found here by class, not by deltaw."""
    head = net.get_output_embeddings()
    return [n for n, m in net.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def dense_copy(kind: str, net: PreTrainedModel) -> PreTrainedModel:
    """`make_net(kind)` with the dequantised weights of `net` written into its own plain modules."""
    dense = make_net(kind)
    with torch.no_grad():
        for name, weight in frozen_weights(net).items():
            module = dense.get_submodule(name)
            w = weight.dense()
            module.weight.copy_(w.T if isinstance(module, Conv1D) else w)
    return dense


def results(net: PreTrainedModel) -> dict[str, Tensor]:
    """Logits of rows and of a pack, and every gradient of a LoRA over all linear maps and biases."""
    model = Model(net)
    found = {"base": model.logits(IDS), "base pack": model.pack_logits(BATCH)}
    model.attach(Lora(rank=3, alpha=5, bias="lora_only"))
    randomise(model)
    logits = model.logits(IDS)
    pack = model.pack_logits(BATCH)
    weights = torch.randn(pack.shape, generator=torch.Generator().manual_seed(2))
    (logits.square().mean() + (pack * weights).mean()).backward()
    found |= {"logits": logits.detach(), "pack": pack.detach()}
    return found | {f"gradient of {k}": t.grad for k, t in model.trainable().items()}


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(1.0, float(value.abs().max()))
        torch.testing.assert_close(found[key], value, rtol=0, atol=ATOL * scale, msg=lambda m, k=key: f"{k}: {m}")


def test_a_quantised_network_is_the_network_with_dequantised_weights(pair):
    kind, how = pair
    net = quantise_network(make_net(kind), how)
    assert list(frozen_weights(net)) == linear_maps(make_net(kind))
    assert {(type(w).__name__.lower(), w.block, w.double_quant) for w in frozen_weights(net).values()} == {
        (f"{how.name}weight", how.block, how.double_quant)
    }
    wanted, found = results(dense_copy(kind, net)), results(net)
    assert all(bool(t.any()) for k, t in found.items() if "gradient" in k)
    same(found, wanted)
    assert float((wanted["base"] - Model(make_net(kind)).logits(IDS)).abs().max()) > 1e-3  # quantising does something


def test_loading_quantises_as_in_memory(pair, tmp_path):
    kind, how = pair
    make_net(kind).save_pretrained(tmp_path)
    loaded, made = load_transformers(tmp_path, "float32", how), quantise_network(make_net(kind), how)
    loaded.config._attn_implementation = "eager"
    assert [n for n, _ in loaded.named_modules()] == [n for n, _ in made.named_modules()]
    same_weights(loaded, made)
    for name, value in made.state_dict().items():  # what stays dense
        assert torch.equal(loaded.state_dict()[name], value), name
    same(results(loaded), results(made))


def same_weights(one: PreTrainedModel, two: PreTrainedModel) -> None:
    """The same codes and constants, bit for bit."""
    mine, theirs = frozen_weights(one), frozen_weights(two)
    assert mine.keys() == theirs.keys()
    for name in mine:
        a, b = dict(mine[name].named_buffers()), dict(theirs[name].named_buffers())
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_head_embeddings_norms_and_biases_stay_dense(pair):
    kind, how = pair
    dense, net = make_net(kind), quantise_network(make_net(kind), how)
    maps = set(linear_maps(dense))
    kept = {n: p for n, p in dense.named_parameters() if n.rpartition(".")[0] not in maps or n.endswith(".bias")}
    assert list(dict(net.named_parameters())) == list(kept)
    assert all(torch.equal(p, kept[n]) for n, p in net.named_parameters())
    head = net.get_output_embeddings()
    assert type(head) is nn.Linear
    assert (head.weight is net.get_input_embeddings().weight) == dense.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_codes_are_of_what_the_file_holds_whatever_dtype_is_asked_for(kind, dtype, tmp_path):
    net = make_net(kind)
    net.save_pretrained(tmp_path)  # float32
    how = Format("nf4", 64, True)
    loaded = load_transformers(tmp_path, dtype, how)
    same_weights(loaded, quantise_network(net, how))
    assert {w.dtype for w in frozen_weights(loaded).values()} == {getattr(torch, dtype)}
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert loaded(input_ids=IDS).logits.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_files_in_other_dtypes_are_quantised_as_they_are(stored, tmp_path):
    net = make_net("llama").to(stored)
    net.save_pretrained(tmp_path)
    loaded = load_transformers(tmp_path, "float32", Format("int8", 128))
    same_weights(loaded, quantise_network(net.float(), Format("int8", 128)))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shards_are_quantised_as_one_file_is(kind, tmp_path):
    make_net(kind).save_pretrained(tmp_path / "one")
    make_net(kind).save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    how = Format("fp4", 32, True)
    one, many = (load_transformers(tmp_path / part, "float32", how) for part in ("one", "many"))
    same_weights(one, many)
    assert torch.equal(one(input_ids=IDS).logits, many(input_ids=IDS).logits)


def test_detach_gives_the_quantised_base_back(pair):
    kind, how = pair
    net = quantise_network(make_net(kind), how)
    before = [(n, id(m)) for n, m in net.named_modules()]
    kept = {n: copy.deepcopy(dict(w.named_buffers())) for n, w in frozen_weights(net).items()}
    model = Model(net)
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5, bias="all", save_modules=["lm_head"] if kind == "llama" else []))
    assert torch.equal(model.logits(IDS), base)
    randomise(model)
    model.logits(IDS).square().mean().backward()
    assert not torch.equal(model.logits(IDS), base)
    model.detach()
    assert [(n, id(m)) for n, m in net.named_modules()] == before
    assert torch.equal(model.logits(IDS), base)
    for name, weight in frozen_weights(net).items():
        assert all(torch.equal(t, kept[name][k]) for k, t in weight.named_buffers())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantised_network_is_ordinary_to_transformers(kind, tmp_path: Path):
    make_net(kind).save_pretrained(tmp_path)
    net = load_transformers(tmp_path, "float32", Format("nf4"))
    assert not hasattr(net.config, "quantization_config")
    assert not getattr(net, "is_quantized", False)
    assert "_get_dtype_plan" not in vars(net)
    out = net.generate(IDS[:1, :3], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    step = IDS[:1, :3]
    for _ in range(4):  # without a cache
        step = torch.cat([step, net(input_ids=step, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, step)
