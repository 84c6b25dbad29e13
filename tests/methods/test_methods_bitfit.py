"""BitFit trains biases and nothing else, says so where there are none, and adds them where asked."""

from __future__ import annotations

import json

import pytest
import torch
from made_runs import trained_and_inspected
from safetensors.torch import load_file, save_file
from torch import nn

from deltaw import BitFit, Lora
from deltaw.core.fingerprint import set_cache_dir
from deltaw.errors import AdapterError, NotMergeable, TargetError
from deltaw.merge.bake import bake
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.store.peft import read_adapter, to_peft_config, write_adapter
from models import ARCHITECTURES, dense_logits, make_ids, make_net, randomise
from train.tiny_runs import save_base

IDS = make_ids()
ATOL = RTOL = 1e-5  # float32 sums through two blocks, the bias added at another place; logits of order 1 to 5
BARE = {"attention_bias": False, "mlp_bias": False}  # a Llama as it is shipped


@pytest.fixture(autouse=True)
def cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


def biases(net: nn.Module) -> dict[str, torch.Tensor]:
    """Every bias of the base but those of its head."""
    head = {id(p) for p in net.get_output_embeddings().parameters()}
    return {n: p for n, p in net.named_parameters() if n.endswith("bias") and id(p) not in head}


def trained(model: Model) -> set[str]:
    """The base's names of what trains."""
    return {n.removeprefix("replace:").replace(":bias", ".bias") for n in model.trainable()}


@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k != "mistral"])
def test_every_bias_trains_but_the_heads_and_nothing_else(kind):
    net = make_net(kind)
    wanted = set(biases(net))
    model = Model(net)
    model.attach(BitFit())
    assert trained(model) == wanted
    assert len(wanted) >= 6
    if kind == "phi":
        assert net.get_output_embeddings().bias is not None


@pytest.mark.parametrize("kind", [k for k in ARCHITECTURES if k != "mistral"])
def test_it_computes_what_the_base_computes_with_those_biases(kind):
    model = Model(make_net(kind))
    base = model.logits(IDS)
    model.attach(BitFit())
    assert torch.equal(model.logits(IDS), base)
    randomise(model)
    wanted = dense_logits(make_net(kind), model, {"default": 1.0}, IDS)
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=RTOL, atol=ATOL)
    assert float((wanted - base).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_gradients_are_those_of_the_bases_own_biases(kind):
    plain = make_net(kind).requires_grad_(False)
    own = biases(plain)
    for value in own.values():
        value.requires_grad_()
    model = Model(make_net(kind))
    model.attach(BitFit())
    for logits in (plain(IDS).logits, model.logits(IDS)):
        nn.functional.cross_entropy(logits.flatten(0, 1), make_ids(seed=6).flatten()).backward()
    got = {n.removeprefix("replace:").replace(":bias", ".bias"): t.grad for n, t in model.trainable().items()}
    assert set(got) == set(own)
    for name, grad in got.items():
        torch.testing.assert_close(grad, own[name].grad, rtol=RTOL, atol=ATOL)  # sums over 22 tokens


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "nf4"])
def test_it_starts_at_the_base_bit_for_bit(kind, dtype, add):
    wide = {"n_embd": 768, "n_inner": 832} if kind == "gpt2" else {"hidden_size": 768, "intermediate_size": 832}
    bare = BARE if add and kind != "gpt2" else {}
    net = make_net("llama" if kind == "nf4" else kind, dtype=dtype, **wide, **bare)
    model = Model(quantise_network(net, Format("nf4", 64, True)) if kind == "nf4" else net)
    with torch.no_grad():
        base = model.logits(IDS)
        model.attach(BitFit(add=add))
        assert torch.equal(model.logits(IDS), base)
        randomise(model)
        assert not torch.equal(model.logits(IDS), base)


# Where there is no bias --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"targets": "all-linear"}, {"targets": ("q_proj", "down_proj")}])
def test_a_base_without_biases_is_an_error_that_says_what_to_do(settings):
    model = Model(make_net("llama", **BARE))
    with pytest.raises(TargetError, match=r"no map of targets=.* has one\. Set add: true to give maps biases"):
        model.attach(BitFit(**settings))
    assert model.adapters == {}


def test_a_name_without_a_bias_is_an_error_and_all_linear_leaves_it_out():
    model = Model(make_net("qwen2"))  # biases at queries, keys and values alone
    with pytest.raises(TargetError, match=r"finds no bias at o_proj, down_proj: remove it from targets"):
        model.attach(BitFit(targets=("q_proj", "o_proj", "down_proj")))
    with pytest.raises(TargetError, match="finds no bias at embed_tokens"):
        model.attach(BitFit(targets=("q_proj", "embed_tokens"), add=True))
    model.attach(BitFit())
    made = model.adapters["default"]
    assert {n.rsplit(".", 1)[-1] for n in made.sites} == {"q_proj", "k_proj", "v_proj"}
    assert len(made.sites) == 6
    assert to_peft_config(model.adapter())["target_modules"] == ["k_proj", "q_proj", "v_proj"]


def test_added_biases_are_added_and_no_more():
    model = Model(make_net("qwen2"))
    model.attach(BitFit(add=True))
    made = model.adapters["default"]
    assert len(made.sites) == 2 * 7
    assert all(not bool(made.sites[n]["bias"].any()) for n in made.sites if "o_proj" in n or "mlp" in n)
    randomise(model)
    plain = make_net("qwen2")
    for name, params in made.sites.items():
        plain.get_submodule(name).bias = nn.Parameter(params["bias"].detach().clone())
    with torch.no_grad():
        torch.testing.assert_close(model.logits(IDS), plain(IDS).logits, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize(("norms", "n"), [(True, 2 * 6 + 2 * 2 + 1), (False, 2 * 6)])
def test_biases_of_norms_train_unless_they_are_left_out(norms, n):
    model = Model(make_net("opt"))
    model.attach(BitFit(norms=norms))
    assert len(model.trainable()) == n  # four maps of attention and two of the feed-forward a layer, two norms, a last


def test_a_set_is_the_base_and_the_weighted_sum_of_its_deltas():
    model = Model(make_net("gpt2"))
    for name, spec, seed in (("one", BitFit(), 1), ("two", BitFit(), 2)):
        model.attach(spec, name)
        randomise(model, name, seed)
    weights = {"one": 1.0, "two": -0.5}
    model.use(weights)
    wanted = dense_logits(make_net("gpt2"), model, weights, IDS)
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=RTOL, atol=ATOL)


def test_a_lora_beside_it_adds_its_delta():
    model = Model(make_net("llama"))
    for name, spec, seed in (("one", BitFit(), 1), ("two", Lora(rank=3, alpha=5), 2)):
        model.attach(spec, name)
        randomise(model, name, seed)
    model.use({"one": 1.0, "two": 0.5})
    made, lora = model.adapters["one"], model.adapters["two"]
    plain = make_net("llama")
    with torch.no_grad():
        for name, params in made.sites.items():
            plain.get_submodule(name).bias.copy_(params["bias"])
            A, B = lora.sites[name]["A"], lora.sites[name]["B"]
            plain.get_submodule(name).weight.add_(0.5 * 5 / 3 * B @ A)
        torch.testing.assert_close(model.logits(IDS), plain(IDS).logits, rtol=RTOL, atol=ATOL)


# Files and merging ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"layers": [1]}, {"add": True, "norms": False, "exclude": ["q_proj"]}])
def test_its_file_holds_the_bases_names_and_is_read_back_with_and_without_ours(settings, tmp_path):
    model = Model(make_net("qwen2" if settings.get("add") else "opt"))
    model.attach(BitFit(**settings))
    randomise(model)
    write_adapter(model.adapter(), tmp_path)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert {n.removeprefix("base_model.model.") for n in file} == trained(model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["add_biases"]) == ("BITFIT", bool(settings.get("add")))
    assert "HF PEFT" not in (tmp_path / "README.md").read_text()
    wanted = model.logits(IDS)
    for _ in range(2):
        again = Model(make_net("qwen2" if settings.get("add") else "opt"))
        again.attach(tmp_path)
        assert torch.equal(again.logits(IDS), wanted)
        assert trained(model) == {
            n.removeprefix("replace:").replace(":bias", ".bias") for n in again.adapters["default"].tensors()
        }
        (tmp_path / "deltaw.json").unlink(missing_ok=True)  # then as a foreign file


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        (
            "model.decoder.layers.1.fc1.bias",
            r"no tensors for model\.decoder\.layers\.1\.fc1, which its settings target",
        ),
        ("model.decoder.final_layer_norm.bias", r"no tensors for model\.decoder\.final_layer_norm\.bias"),
    ],
)
def test_a_file_that_lacks_a_bias_is_refused(gone, said, tmp_path):
    model = Model(make_net("opt"))
    model.attach(BitFit())
    write_adapter(model.adapter(), tmp_path)
    (tmp_path / "deltaw.json").unlink()
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[f"base_model.model.{gone}"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(AdapterError, match=said):
        Model(make_net("opt")).attach(tmp_path)


def test_a_base_without_those_biases_refuses_the_file():
    model = Model(make_net("llama"))
    model.attach(BitFit())
    with pytest.raises(AdapterError, match=r"q_proj has bias, which its settings do not ask for"):
        Model(make_net("llama", **BARE)).attach(model.adapter())


@pytest.mark.parity
def test_peft_refuses_the_folder_by_name(tmp_path):
    peft = pytest.importorskip("peft")
    model = Model(make_net("opt"))
    model.attach(BitFit())
    write_adapter(model.adapter(), tmp_path)
    with pytest.raises((KeyError, ValueError), match="BITFIT"):
        peft.PeftModel.from_pretrained(make_net("opt"), tmp_path)
    assert read_adapter(tmp_path).spec == BitFit()


@pytest.mark.parametrize("kind", ["opt", "gpt2", "qwen2"])
def test_a_merge_writes_the_biases_and_nothing_else(kind, tmp_path):
    folder = save_base(tmp_path / "base", kind=kind)
    model = load_base(folder)
    model.attach(BitFit())
    randomise(model)
    bake(folder, model.adapter(), tmp_path / "out", measure=False)
    before, after = (load_base(f).net.state_dict() for f in (folder, tmp_path / "out"))
    assert set(before) == set(after)
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == trained(model)
    for name, value in model.trainable().items():
        assert torch.equal(after[name.removeprefix("replace:").replace(":bias", ".bias")], value.detach())


def test_a_merge_of_added_biases_is_refused(tmp_path):
    folder = save_base(tmp_path / "base", **BARE)
    model = load_base(folder)
    model.attach(BitFit(add=True))
    with pytest.raises(NotMergeable, match=r"adds a bias at model\.layers\.0\.self_attn\.q_proj, where the base has"):
        bake(folder, model.adapter(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_recipe_trains_it_and_inspect_and_plan_say_what_it_is(kind, tmp_path):
    losses, told, counts = trained_and_inspected(tmp_path, {"method": "bitfit"}, kind)
    assert losses[-1] < losses[0] - 0.5
    llama = 2 * (32 + 16 + 16 + 32 + 40 + 40 + 32)
    gpt2 = 2 * (96 + 32 + 40 + 32 + 2 * 32) + 32  # maps and two norms a layer, and the last norm
    assert told["method"] == "bitfit"
    assert told["n_parameters"] == counts.trainable == {"llama": llama, "gpt2": gpt2}[kind]
    assert counts.adapter == counts.stored == 4 * counts.trainable
    assert len(told["replaced"]) == {"llama": 0, "gpt2": 5}[kind]
