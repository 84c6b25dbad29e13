"""HF PEFT and deltaw compute the same logits and gradients from the same adapter, in both directions."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deltaw import Lora
from deltaw.errors import AdapterError
from deltaw.model.identity import OtherBaseWarning
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter, write_adapter
from deltaw.store.peft_options import KNOWN
from models import EMBEDDING, VOCAB, make_fingerprint, make_ids, make_net, randomise

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    # PEFT says what it does of its own accord: none of it concerns us
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tied:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*no modules were excluded:UserWarning"),
]

IDS = make_ids()
# float32: PEFT multiplies B (A x) by the scale at another place, so logits of order 1 to 5 differ by a few tens
# of roundings (6e-8) through two blocks; the promise is 1e-5, relative where logits are larger than 1
ATOL = RTOL = 1e-5


def config(**settings: object) -> peft.LoraConfig:
    """A LoRA with numbers that cannot hide."""
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": "all-linear", **settings}, task_type="CAUSAL_LM"
    )


def peft_model(net: nn.Module, settings: peft.LoraConfig, seed: int = 11) -> nn.Module:
    """PEFT's model with every trainable tensor randomised."""
    made = peft.get_peft_model(net, settings)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in made.named_parameters():
            if value.requires_grad:
                noise = 0.3 * torch.randn(value.shape, generator=rng)
                value.copy_(noise if "lora_" in name else value + noise)
    return made.eval()


def saved(net: nn.Module, settings: peft.LoraConfig, folder: Path, **how: object) -> Tensor:
    """PEFT makes, randomises and saves an adapter; its logits."""
    made = peft_model(net, settings)
    made.save_pretrained(folder, **how)
    with torch.no_grad():
        return made(input_ids=IDS).logits


def compare_both_ways(make, settings: peft.LoraConfig, folder: Path) -> Model:
    """PEFT's file gives PEFT's logits here; the same adapter, saved by us, gives them there."""
    with torch.no_grad():
        base = make()(input_ids=IDS).logits
    wanted = saved(make(), settings, folder / "theirs")
    assert float((wanted - base).abs().max()) > 0.1
    ours = Model(make())
    ours.attach(folder / "theirs")
    torch.testing.assert_close(ours.logits(IDS), wanted, rtol=RTOL, atol=ATOL)
    write_adapter(ours.adapter(), folder / "ours")
    load_into_peft(make, folder / "ours", ours.logits(IDS))
    return ours


def load_into_peft(make, folder: Path, wanted: Tensor) -> None:
    net = make()
    back = peft.PeftModel.from_pretrained(net, folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(back(input_ids=IDS).logits, wanted.detach(), rtol=RTOL, atol=ATOL)
    again = Model(make())
    again.attach(folder)
    torch.testing.assert_close(again.logits(IDS), wanted, rtol=0, atol=0)


@pytest.fixture
def kind(request, net) -> str:
    return request.node.callspec.params["net"]


def test_an_adapter_that_peft_saved_gives_pefts_logits(kind, tmp_path):
    compare_both_ways(lambda: make_net(kind), config(fan_in_fan_out=kind == "gpt2"), tmp_path)


def test_an_adapter_that_we_made_gives_our_logits_in_peft(kind, tmp_path):
    ours = Model(make_net(kind))
    ours.attach(Lora(rank=3, alpha=5, targets="all-linear", rslora=True))
    randomise(ours)
    write_adapter(ours.adapter(), tmp_path / "ours")
    load_into_peft(lambda: make_net(kind), tmp_path / "ours", ours.logits(IDS))


def test_gradients_equal_pefts(kind):
    theirs = peft_model(make_net(kind), config(fan_in_fan_out=kind == "gpt2"))
    ours = Model(make_net(kind))
    ours.attach(Lora(rank=3, alpha=5))
    names = {}
    for name, value in theirs.named_parameters():
        if value.requires_grad:
            site, _, part = name.removeprefix("base_model.model.").partition(".lora_")
            names[f"{site}:{part[0]}"] = value
            with torch.no_grad():
                ours.adapters["default"].sites[site][part[0]].copy_(value)
    labels = make_ids(seed=6)
    losses = []
    for logits in (theirs(input_ids=IDS).logits, ours.logits(IDS)):
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=0, atol=ATOL)
    assert set(names) == set(ours.trainable())
    for name, value in ours.trainable().items():
        assert bool(value.grad.any())
        torch.testing.assert_close(value.grad, names[name].grad, rtol=RTOL, atol=ATOL)  # sums over 22 tokens


def test_a_fresh_adapter_has_pefts_places_shapes_and_scales(kind):
    theirs = peft.get_peft_model(make_net(kind), config(fan_in_fan_out=kind == "gpt2", use_rslora=True))
    ours = Model(make_net(kind))
    ours.attach(Lora(rank=3, alpha=5, rslora=True))
    shapes, scales = {}, {}
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            site = name.removeprefix("base_model.model.")
            shapes[site] = (module.lora_A["default"].weight.shape, module.lora_B["default"].weight.shape)
            scales[site] = module.scaling["default"]
    sites = ours.adapters["default"].sites
    assert {s: (p["A"].shape, p["B"].shape) for s, p in sites.items()} == shapes
    assert {s: ours.adapters["default"].spec.scale_at(ours.places.sites[s]) for s in sites} == scales


VARIANTS = {
    "rslora": {"use_rslora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no init": {"init_lora_weights": False},
    "patterns": {
        "rank_pattern": {"q_proj": 5, r"layers\.1\.mlp\..*": 2},
        "alpha_pattern": {"v_proj": 7, "down_proj": 1},
    },
    "patterns and rslora": {"use_rslora": True, "rank_pattern": {"o_proj": 5}, "alpha_pattern": {"o_proj": 11}},
    "bias all": {"bias": "all"},
    "bias all, few targets": {"bias": "all", "target_modules": ["q_proj"]},
    "bias lora_only": {"bias": "lora_only", "target_modules": ["q_proj", "up_proj"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norms": {"modules_to_save": ["norm"]},
    "saved head and last norm": {"modules_to_save": ["lm_head", "model.norm"], "target_modules": ["q_proj"]},
    "saved block": {"modules_to_save": ["mlp"], "target_modules": ["q_proj", "v_proj"]},
    "saved embedding": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    "saved head and biases": {"modules_to_save": ["lm_head"], "bias": "all"},
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "head": {"target_modules": ["lm_head", "up_proj"]},
    "excluded list": {"target_modules": ["q_proj", "v_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    "excluded expression": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\.self_attn\.v_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 0},
    "paths, layers that PEFT ignores": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
        "layers_to_transform": [1],
    },
    "a path and a name, layers at the name alone": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "up_proj", "lm_head"],
        "layers_to_transform": [1],
    },
    "excluded names of which one matches nothing": {"exclude_modules": ["q_proj", "no_such_proj"]},
    "an excluded expression that matches nothing": {"exclude_modules": r".*no_such.*"},
    "saved norms and biases": {"modules_to_save": ["norm", "mlp"], "target_modules": ["q_proj"], "bias": "all"},
    "a name that matches nothing": {"target_modules": ["q_proj", "no_such_proj"]},
    "layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "expression": {"target_modules": r".*\.(0\.self_attn\.(q|k)_proj|1\.mlp\.down_proj)"},
    "one name": {"target_modules": ["model.layers.1.mlp.gate_proj", "k_proj"]},
    "dropout": {"lora_dropout": 0.3},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 7, 11]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_setting_gives_the_same_logits_both_ways(variant, tied, tmp_path):
    ours = compare_both_ways(lambda: make_net("llama", tie_word_embeddings=tied), config(**VARIANTS[variant]), tmp_path)
    assert ours.net.config.tie_word_embeddings == tied


def test_rows_of_embedding_and_head_that_are_not_tied(tmp_path):
    rows = {"embed_tokens": [3, 7], "lm_head": [7, 11, 50]}
    ours = compare_both_ways(
        lambda: make_net("llama"), config(target_modules=["q_proj"], trainable_token_indices=rows), tmp_path
    )
    assert {n: ids.tolist() for n, (ids, _) in ours.adapters["default"].rows.items()} == {
        "model.embed_tokens.weight": [3, 7],
        "lm_head.weight": [7, 11, 50],
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_fc"], "bias": "lora_only"},
        {"target_modules": ["wte", "c_attn"]},
        {"target_modules": ["wpe", "wte"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wte"]},
        {"target_modules": ["c_attn"], "trainable_token_indices": {"wte": [2, 5]}},
        {"target_modules": r".*\.h\.1\..*c_proj", "rank_pattern": {"mlp.c_proj": 4}},
    ],
    ids=str,
)
def test_gpt2_with_its_transposed_weights_and_tied_head(settings, tmp_path):
    compare_both_ways(lambda: make_net("gpt2"), config(**settings, fan_in_fan_out=True), tmp_path)


def test_our_patterns_keep_their_order_in_peft(tmp_path):
    """The first key that matches counts, and not the first of the alphabet."""
    ours = Model(make_net("llama"))
    patterns = {r"model\.layers\.0\..*v_proj": 11.0, ".*v_proj": 2.0}
    ours.attach(Lora(rank=3, alpha=5, alpha_pattern=patterns, rank_pattern={r"model.*\.1\..*": 2, r".*v_proj": 4}))
    randomise(ours)
    write_adapter(ours.adapter(), tmp_path)
    load_into_peft(lambda: make_net("llama"), tmp_path, ours.logits(IDS))


def test_biases_of_norms_that_are_saved_whole_too(tmp_path):
    """PEFT writes such a bias three times; the saved module's own counts."""
    settings = config(modules_to_save=["ln_f"], bias="all", target_modules=["c_attn"], fan_in_fan_out=True)
    compare_both_ways(lambda: make_net("gpt2"), settings, tmp_path)


def test_rows_under_a_change_of_the_same_tied_head_are_refused(tmp_path):
    """PEFT adds the two; here the rows would count alone, with other logits."""
    settings = config(target_modules=["q_proj", "lm_head"], trainable_token_indices=[3, 7])
    saved(make_net("llama", tie_word_embeddings=True), settings, tmp_path)
    with pytest.raises(AdapterError, match=r"sets rows of model\.embed_tokens\.weight and changes lm_head"):
        Model(make_net("llama", tie_word_embeddings=True)).attach(tmp_path)
    compare_both_ways(lambda: make_net("llama"), settings, tmp_path / "untied")


@pytest.mark.parametrize("kind", ["phi", "gpt_neox", "opt", "gemma"])
@pytest.mark.parametrize("what", ["biases", "embedding and head"])
def test_biases_embeddings_and_heads_of_other_architectures(kind, what, tmp_path):
    embedding = EMBEDDING.get(kind, "embed_tokens")
    settings = {"bias": "all"} if what == "biases" else {"target_modules": [embedding, "lm_head"]}
    compare_both_ways(lambda: make_net(kind), config(**settings), tmp_path)


def test_base_weights_saved_beside_a_targeted_embedding_are_used(tmp_path):
    """PEFT writes the embedding itself too; where it is not this base's, that one counts."""

    def changed() -> nn.Module:
        net = make_net("llama")
        with torch.no_grad():
            net.model.embed_tokens.weight[:5] += 1
            net.lm_head.weight[:5] += 1
        return net

    wanted = saved(changed(), config(target_modules=["embed_tokens", "lm_head"]), tmp_path / "theirs")
    ours = Model(make_net("llama"))
    ours.attach(tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(IDS), wanted, rtol=RTOL, atol=ATOL)


def test_base_weights_that_are_this_bases_are_not_kept_twice(tmp_path):
    saved(make_net("llama"), config(target_modules=["embed_tokens"]), tmp_path / "theirs")
    held = read_adapter(tmp_path / "theirs").replaced
    assert [r.tensor for r in held] == ["model.embed_tokens.weight"]
    ours = Model(make_net("llama"))
    ours.attach(tmp_path / "theirs")
    assert ours.adapters["default"].swaps == {}


def test_an_adapter_that_peft_saved_under_another_name_is_found_in_its_folder(tmp_path):
    net = make_net("llama")
    made = peft.get_peft_model(net, config(), adapter_name="legal")
    made.save_pretrained(tmp_path)
    assert read_adapter(tmp_path / "legal").spec.rank == 3
    with pytest.raises(AdapterError, match=r"holds no adapter.*legal"):
        read_adapter(tmp_path)


def test_a_bfloat16_adapter_of_peft_is_read_as_it_is(tmp_path):
    wanted = saved(make_net("llama", dtype=torch.bfloat16), config(), tmp_path / "theirs")
    ours = Model(make_net("llama", dtype=torch.bfloat16))
    ours.attach(tmp_path / "theirs")
    # both round every product to bfloat16: errors of an eighth of a percent of logits up to 8 per rounding
    assert float((ours.logits(IDS) - wanted).abs().mean()) < 0.03


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_bias": True}, "asks for lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*changed at initialisation"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
    ids=str,
)
def test_what_method_lora_cannot_say_is_refused_by_name(settings, said, tmp_path):
    made = peft.get_peft_model(make_net("llama"), config(target_modules=["q_proj"], **settings))
    made.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path)


@pytest.mark.parametrize("key", ["target_parameters", "megatron_config", "use_qalora", "use_bdlora", "arrow_config"])
def test_a_config_that_asks_for_something_else_is_refused_by_name(key, tmp_path):
    saved(make_net("llama"), config(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: ["x"]}))
    with pytest.raises(AdapterError, match=f"asks for {key}"):
        read_adapter(tmp_path)


def test_an_option_that_nobody_knows_is_refused_by_name(tmp_path):
    wanted = saved(make_net("llama"), config(), tmp_path)
    path = tmp_path / "adapter_config.json"
    plain = json.loads(path.read_text())
    path.write_text(json.dumps({**plain, "use_tomorrow": False, "tomorrow_config": None, "tomorrow": {}}))
    ours = Model(make_net("llama"))
    ours.attach(tmp_path)
    torch.testing.assert_close(ours.logits(IDS), wanted, rtol=RTOL, atol=ATOL)
    path.write_text(json.dumps({**plain, "use_tomorrow": True}))
    with pytest.raises(AdapterError, match="asks for use_tomorrow=True, which this deltaw does not know"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    "kind", ["LoraConfig", "IA3Config", "VeraConfig", "PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_every_option_of_this_peft_is_known(kind):
    assert {f.name for f in dataclasses.fields(getattr(peft, kind))} - {"runtime_config"} <= KNOWN


def test_another_method_of_peft_is_refused_by_name(tmp_path):
    settings = peft.LoHaConfig(target_modules=["q_proj", "down_proj"])
    peft.get_peft_model(make_net("llama"), settings).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"says peft_type='LOHA'; known here: .*LORA"):
        read_adapter(tmp_path)


def test_a_pickle_that_peft_saved_is_refused_by_name(tmp_path):
    saved(make_net("llama"), config(), tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a pickle"):
        read_adapter(tmp_path)


def test_a_truncated_file_of_peft_is_refused(tmp_path):
    saved(make_net("llama"), config(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="is truncated or no safetensors file"):
        read_adapter(tmp_path)


def test_an_adapter_for_a_larger_model_is_refused_with_what_is_left_over(tmp_path):
    saved(make_net("llama", num_hidden_layers=2), config(target_modules=["q_proj"]), tmp_path)
    small = Model(make_net("gpt_neox"))
    with pytest.raises(AdapterError, match=r"target 'q_proj' matches no linear map.*no such place in this model"):
        small.attach(tmp_path)
    assert small.adapters == {}
    assert small.net.config.vocab_size == VOCAB


def test_a_foreign_adapter_on_a_known_base_is_unknown_and_still_right(tmp_path):
    wanted = saved(make_net("llama"), config(), tmp_path)
    model = Model(make_net("llama"), fingerprint=make_fingerprint())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.attach(tmp_path)
    assert [w.category for w in caught] == [OtherBaseWarning]
    torch.testing.assert_close(model.logits(IDS), wanted, rtol=RTOL, atol=ATOL)
