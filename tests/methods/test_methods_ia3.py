"""IA3 is PEFT's, both ways; `auto` finds what the paper scales; it starts at the base bit for bit, and merges."""

from __future__ import annotations

import json

import pytest
import torch
from made_runs import trained_and_inspected
from torch import nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from deltaw import Ia3
from deltaw.core.fingerprint import set_cache_dir
from deltaw.core.site import LinearSite
from deltaw.errors import AdapterError, TargetError
from deltaw.merge.bake import bake
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.model.sites import find_sites
from deltaw.store.peft import read_adapter, write_adapter
from models import ARCHITECTURES, make_ids, make_net, randomise
from train.tiny_runs import save_base

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

IDS = make_ids()
ATOL = RTOL = 1e-5  # float32: PEFT scales W x + b at once, we W x and b; logits of order 1 to 5, through two blocks

KEYS = {"k_proj": False, "v_proj": False}
AUTO = {  # ends of paths -> whether the input is scaled
    **{kind: {**KEYS, "down_proj": True} for kind in ("llama", "mistral", "qwen2", "gemma", "gemma2")},
    **{kind: {**KEYS, "fc2": True} for kind in ("phi", "opt")},
    "gpt2": {"c_attn": False, "mlp.c_proj": True},
    "gpt_neox": {"query_key_value": False, "dense_4h_to_h": True},
    "t5": {"k": False, "v": False, "wo": True},
    "bert": {"key": False, "value": False, "0.output.dense": True, "1.output.dense": True},
}
PEFT_LEAVES_THE_PAPER = {  # what PEFT's table says in place of what
    **{kind: ({"q_proj"}, {"k_proj"}) for kind in ("qwen2", "gemma", "gemma2", "phi")},
    "opt": ({"q_proj"}, {"v_proj"}),
    "bert": ({"output.dense"}, {"0.output.dense", "1.output.dense"}),  # BERT's attention ends in output.dense too
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


def any_net(kind: str) -> nn.Module:
    if kind == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
        return BertForMaskedLM(BertConfig(vocab_size=53, **sizes))
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}
        return T5ForConditionalGeneration(T5Config(vocab_size=53, **sizes))
    return make_net(kind)


@pytest.mark.parametrize("kind", AUTO)
def test_auto_is_keys_values_and_the_last_feed_forward_map(kind):
    net, spec, wanted = any_net(kind), Ia3(), AUTO[kind]
    found = {s.name: spec.scales_input(s) for s in spec.choose(list(find_sites(net).values()))}
    maps = [n for n, m in net.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    assert found == {n: flag for n in maps for end, flag in wanted.items() if n.endswith("." + end)}
    n_attentions = 6 if kind == "t5" else 2  # T5: two in the encoder, four in the decoder
    n_last = 4 if kind == "t5" else 2
    assert sum(found.values()) == n_last
    assert len(found) == n_last + n_attentions * (1 if kind in ("gpt2", "gpt_neox") else 2)


@pytest.mark.parametrize("kind", AUTO)
def test_auto_is_pefts_choice_where_that_is_the_papers(kind):
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
    from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

    theirs, ours = PEFT_LEAVES_THE_PAPER.get(kind, (set(), set()))
    assert set(TARGETS[kind]) == (set(AUTO[kind]) - ours) | theirs
    assert set(FEEDFORWARD[kind]) - theirs == {end for end, flag in AUTO[kind].items() if flag} - ours


def test_auto_where_no_name_is_known_asks_for_names():
    net = make_net("llama")
    for layer in net.model.layers:
        layer.mlp.last = layer.mlp.down_proj
        del layer.mlp.down_proj
    with pytest.raises(TargetError, match=r"targets='auto' finds no place in this model: name some\. It has: .*q_proj"):
        Model(net).attach(Ia3())


# PEFT, both ways ---------------------------------------------------------------------------------------------------


def theirs(kind: str, **settings: object) -> nn.Module:
    """PEFT's model with noise around one in every vector."""
    wanted = {"target_modules": list(AUTO[kind]), "feedforward_modules": [e for e, last in AUTO[kind].items() if last]}
    made = peft.get_peft_model(make_net(kind), peft.IA3Config(**{**wanted, **settings}, task_type="CAUSAL_LM"))
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in (p for p in made.parameters() if p.requires_grad):
            value += 0.3 * torch.randn(value.shape, generator=rng)
    return made.eval()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_pefts_file_gives_pefts_logits_and_ours_gives_ours_there(kind, tmp_path):
    made = theirs(kind)
    made.save_pretrained(tmp_path / "theirs")
    ours = Model(make_net(kind))
    base = ours.logits(IDS)
    ours.attach(tmp_path / "theirs")
    with torch.no_grad():
        wanted = made(input_ids=IDS).logits
        torch.testing.assert_close(ours.logits(IDS), wanted, rtol=RTOL, atol=ATOL)
    assert float((wanted - base).abs().max()) > 0.1
    write_adapter(ours.adapter(), tmp_path / "ours")
    one, other = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("theirs", "ours"))
    shared = ("peft_type", "fan_in_fan_out", "init_ia3_weights")
    assert {k: one[k] for k in shared} == {k: other[k] for k in shared}
    for key in ("target_modules", "feedforward_modules"):
        assert sorted(one[key]) == other[key]
    back = peft.PeftModel.from_pretrained(make_net(kind), tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(back(input_ids=IDS).logits, wanted)


@pytest.mark.parametrize("settings", [{}, {"layers": [1]}, {"exclude": ["v_proj", "c_attn"], "targets": "all-linear"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_we_made_gives_our_logits_in_peft(kind, settings, tmp_path):
    if kind == "llama" and "exclude" in settings:
        settings = {**settings, "exclude": ["v_proj"]}
    elif "exclude" in settings:
        settings = {**settings, "exclude": ["c_attn"]}
    ours = Model(make_net(kind))
    ours.attach(Ia3(**settings))
    randomise(ours)
    write_adapter(ours.adapter(), tmp_path)
    back = peft.PeftModel.from_pretrained(make_net(kind), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=IDS).logits, ours.logits(IDS), rtol=RTOL, atol=ATOL)
    (tmp_path / "deltaw.json").unlink()
    again = Model(make_net(kind))
    again.attach(tmp_path)
    with torch.no_grad():
        assert torch.equal(again.logits(IDS), ours.logits(IDS))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_gradients_are_pefts(kind):
    made, ours = theirs(kind), Model(make_net(kind))
    ours.attach(Ia3())
    pairs = {}
    for name, value in made.named_parameters():
        if value.requires_grad:
            site = name.removeprefix("base_model.model.").partition(".ia3_l")[0]
            pairs[f"{site}:l"] = value
            with torch.no_grad():
                ours.adapters["default"].sites[site]["l"].copy_(value)
    assert set(pairs) == set(ours.trainable())
    labels = make_ids(seed=6)
    for logits in (made(input_ids=IDS).logits, ours.logits(IDS)):
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    for name, value in ours.trainable().items():
        assert value.shape == pairs[name].shape
        assert bool(value.grad.any())
        torch.testing.assert_close(value.grad, pairs[name].grad, rtol=RTOL, atol=ATOL)  # sums over 22 tokens


# What it is --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "nf4"])
def test_it_starts_at_the_base_bit_for_bit(kind, dtype):
    wide = {"n_embd": 768, "n_inner": 832} if kind == "gpt2" else {"hidden_size": 768, "intermediate_size": 832}
    net = make_net("llama" if kind == "nf4" else kind, dtype=dtype, **wide)  # wide: sums that are made in parts
    model = Model(quantise_network(net, Format("nf4", 64, True)) if kind == "nf4" else net)
    with torch.no_grad():
        base = model.logits(IDS)
        model.attach(Ia3(targets="all-linear"))
        assert torch.equal(model.logits(IDS), base)
        randomise(model)
        assert not torch.equal(model.logits(IDS), base)


@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.down_proj"])
def test_a_gain_that_bfloat16_cannot_hold_still_acts(name):
    net = make_net("llama", dtype=torch.bfloat16)
    layer = net.model.layers[0].get_submodule(name)
    x = torch.randn(500, layer.in_features, generator=torch.Generator().manual_seed(2)).bfloat16()
    plain = layer(x)
    model = Model(net)
    model.attach(Ia3(targets=(name,)))
    host = net.model.layers[0].get_submodule(name)
    with torch.no_grad():
        model.adapters["default"].sites[host.site.name]["l"].fill_(1.003)  # bfloat16 has 1 and 1.0078
        moved = float(((host(x) - plain) * plain).double().sum() / (plain * plain).double().sum())
    assert moved == pytest.approx(0.003, rel=0.3)  # each product is rounded by up to 0.002; rounded itself, l is 1


def test_the_formula_with_its_bias():
    model = Model(make_net("llama"))
    model.attach(Ia3())
    randomise(model)
    plain = make_net("llama")
    with torch.no_grad():
        for name, params in model.adapters["default"].sites.items():
            layer, gain = plain.get_submodule(name), params["l"]
            layer.weight.mul_(gain)  # [out, 1] scales rows, [1, in] columns
            if gain.shape[1] == 1:
                layer.bias.mul_(gain.flatten())
        torch.testing.assert_close(model.logits(IDS), plain(IDS).logits, rtol=RTOL, atol=ATOL)
    shapes = {n.rsplit(".", 1)[-1]: tuple(p["l"].shape) for n, p in model.adapters["default"].sites.items()}
    assert shapes == {"k_proj": (16, 1), "v_proj": (16, 1), "down_proj": (1, 40)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merged_tensors_are_the_formula(kind, tmp_path):
    folder = save_base(tmp_path / "base", kind=kind)
    model = load_base(folder)
    model.attach(Ia3())
    randomise(model)
    bake(folder, model.adapter(), tmp_path / "out", measure=False)
    before, after = (load_base(f).net.state_dict() for f in (folder, tmp_path / "out"))
    wanted = dict(before)
    for name, params in model.adapters["default"].sites.items():
        gain = params["l"].detach()
        wanted[f"{name}.weight"] = before[f"{name}.weight"] * (gain.T if kind == "gpt2" else gain)
        if gain.shape[1] == 1:
            wanted[f"{name}.bias"] = before[f"{name}.bias"] * gain.flatten()
    assert set(after) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(after[name], value), name  # one product, rounded once


def test_two_of_them_are_the_base_and_the_weighted_sum_of_their_deltas():
    model = Model(make_net("opt"))
    for name, seed in (("one", 1), ("two", 2)):
        model.attach(Ia3(targets=("k_proj",), feedforward=()), name)
        randomise(model, name, seed)
    site = "model.decoder.layers.0.self_attn.k_proj"
    host = model.net.get_submodule(site)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(3))
    seen = {}
    for key, use in {"base": None, "one": "one", "two": "two", "both": {"one": 1.0, "two": 0.5}}.items():
        model.use(use)
        seen[key] = host(x).detach()
    wanted = seen["base"] + (seen["one"] - seen["base"]) + 0.5 * (seen["two"] - seen["base"])
    torch.testing.assert_close(seen["both"], wanted, rtol=0, atol=2e-6)  # a few roundings of order 1


# Settings ------------------------------------------------------------------------------------------------------------


def test_feedforward_says_whose_input_is_scaled():
    for setting, wanted in (("auto", (1, 40)), ((), (32, 1)), (".*mlp.down_proj", (1, 40)), (("down_proj",), (1, 40))):
        model = Model(make_net("llama"))
        model.attach(Ia3(targets=("down_proj", "o_proj"), feedforward=setting))
        sites = model.adapters["default"].sites
        assert tuple(sites["model.layers.0.mlp.down_proj"]["l"].shape) == wanted
        assert tuple(sites["model.layers.0.self_attn.o_proj"]["l"].shape) == (32, 1)


def test_what_cannot_be_is_refused():
    model = Model(make_net("llama"))
    with pytest.raises(TargetError, match=r"feedforward \('up_pro',\) matches none of the targeted places"):
        model.attach(Ia3(feedforward=("up_pro",)))
    with pytest.raises(TargetError, match=r"feedforward 'x\.\*' matches none"):
        model.attach(Ia3(feedforward="x.*"))
    with pytest.raises(TargetError, match=r"model\.embed_tokens is an embedding: do not target it"):
        model.attach(Ia3(targets=("embed_tokens", "k_proj")))
    assert model.adapters == {}


def test_a_file_whose_vectors_stand_the_other_way_is_refused(tmp_path):
    theirs("llama").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "feedforward_modules": []}))
    with pytest.raises(AdapterError, match=r"down_proj:l has shape \(1, 40\), this model needs \(32, 1\)"):
        Model(make_net("llama")).attach(tmp_path)
    assert read_adapter(tmp_path).spec.feedforward == ()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_recipe_trains_it_and_inspect_and_plan_say_what_it_is(kind, tmp_path):
    losses, told, counts = trained_and_inspected(tmp_path, {"method": "ia3"}, kind)
    assert losses[-1] < losses[0] - 0.5
    n = 2 * (16 + 16 + 40) if kind == "llama" else 2 * (96 + 40)  # out of k and v (or qkv), in of the last map
    assert told["method"] == "ia3"
    assert told["n_parameters"] == counts.trainable == n
    assert counts.adapter == counts.stored == counts.gradients == 4 * n
    assert {p["role"]: p["parameters"]["l"] for p in told["places"]} == (
        {"k_proj": [16, 1], "v_proj": [16, 1], "down_proj": [1, 40]}
        if kind == "llama"
        else {"c_attn": [96, 1], "c_proj": [1, 40]}
    )


def test_a_name_of_pefts_feedforward_is_any_end_of_a_name():
    """PEFT compares ends without a dot: "proj" is down_proj too."""
    made = Ia3.from_peft({"target_modules": ["k", "o", "wo"], "feedforward_modules": ["o"]})
    assert [made.scales_input(LinearSite(f"block.0.x.{n}", 4, 5)) for n in ("k", "o", "wo")] == [False, True, True]
    plain = Ia3.from_peft({"target_modules": ["k", "wo"], "feedforward_modules": ["wo"]})
    assert plain.feedforward == ("wo",)
