"""HF PEFT and we compute the same from the same virtual tokens: logits both ways, encoders' vectors, gradients."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_virtual_packs import other
from torch import Tensor, nn
from wearing import METHODS, N, wear

from deltaw.errors import AdapterError
from deltaw.methods import PrefixTuning, Prompt, PTuning
from deltaw.model.model import Model
from deltaw.ops.loss import summed_cross_entropy
from deltaw.store.peft import read_adapter, write_adapter
from models import ARCHITECTURES, make_ids, make_net

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:for MLP, the argument `encoder_num_layers` is ignored:UserWarning"),
]

IDS = make_ids()
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0
# float32: the same operations in the same order but for the LSTM, which PEFT runs for a batch
ATOL = RTOL = 1e-5

CONFIGS = {
    "prompt": lambda **more: peft.PromptTuningConfig(**more),
    "prefix": lambda **more: peft.PrefixTuningConfig(**more),
    "prefix with a projection": lambda **more: peft.PrefixTuningConfig(
        prefix_projection=True, encoder_hidden_size=7, **more
    ),
    "ptuning": lambda **more: peft.PromptEncoderConfig(encoder_hidden_size=9, **more),
    "ptuning by lstm": lambda **more: peft.PromptEncoderConfig(
        encoder_hidden_size=3, encoder_num_layers=3, encoder_reparameterization_type="LSTM", **more
    ),
}


def theirs(net: nn.Module, method: str, **more: object) -> nn.Module:
    """PEFT's model with its own random start."""
    torch.manual_seed(4)
    config = CONFIGS[method](num_virtual_tokens=N, task_type="CAUSAL_LM", **more)
    return peft.get_peft_model(net, config).eval()


def logits(net: nn.Module, mask: Tensor | None = None) -> Tensor:
    """The tokens' logits: PEFT returns those of virtual tokens among inputs too."""
    with torch.no_grad():
        return net(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1] :]


def compare_both_ways(make, method: str, folder: Path, **more: object) -> None:
    made = theirs(make(), method, **more)
    made.save_pretrained(folder / "theirs")
    base = logits(make())
    for mask in (None, MASK):
        wanted = logits(made, mask)
        assert float((wanted - base)[1].abs().max()) > 0.1
        ours = Model(make())
        ours.attach(folder / "theirs")
        seen = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(ours.logits(IDS, mask)[seen], wanted[seen], rtol=RTOL, atol=ATOL)
    write_adapter(ours.adapter(), folder / "ours")
    back = peft.PeftModel.from_pretrained(make(), folder / "ours").eval()
    torch.testing.assert_close(logits(back), ours.logits(IDS).detach(), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2"])
def test_logits_are_equal_both_ways(kind, method, tmp_path):
    # PEFT takes the width of a token's embedding to be hidden_size
    changes = {"word_embed_proj_dim": 32} if kind == "opt" else {}
    compare_both_ways(lambda: make_net(kind, **changes), method, tmp_path)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_logits_are_equal_with_torchs_attention(kind, method, tmp_path):
    def make() -> nn.Module:
        net = make_net(kind)
        net.set_attn_implementation("sdpa")
        return net

    compare_both_ways(make, method, tmp_path)


def test_embeddings_narrower_than_the_model_take_narrow_prompts(tmp_path):
    assert make_net("opt").config.word_embed_proj_dim == 16
    compare_both_ways(lambda: make_net("opt"), "prompt", tmp_path, token_dim=16)
    compare_both_ways(lambda: make_net("opt"), "prefix", tmp_path / "prefix")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("kind", ["gptj", "gpt_neo", "nemotron", "qwen3", "bloom", "falcon"])
def test_architectures_that_cannot_pack_are_equal_too(kind, method, tmp_path):
    # of itself PEFT gives every head of Falcon keys of its own, and fails
    one_head = {"num_attention_heads": 1, "token_dim": 8} if (kind, method) == ("falcon", "prefix") else {}
    compare_both_ways(lambda: other(kind).net, method, tmp_path, **one_head)


@pytest.mark.parametrize("method", METHODS)
def test_what_we_made_gives_our_logits_in_peft(method, tmp_path):
    ours = wear("qwen2", method)
    write_adapter(ours.adapter(), tmp_path)
    back = peft.PeftModel.from_pretrained(make_net("qwen2"), tmp_path).eval()
    torch.testing.assert_close(logits(back), ours.logits(IDS).detach(), rtol=RTOL, atol=ATOL)


def test_the_files_are_pefts_and_say_what_peft_says(tmp_path):
    for method, sits in (("prompt", 32), ("prefix", 2 * 2 * 2 * 8), ("ptuning", 32)):
        theirs(make_net("llama"), method).save_pretrained(tmp_path / method / "theirs")
        ours = wear("llama", method)
        write_adapter(ours.adapter(), tmp_path / method / "ours")
        files = [read_adapter(tmp_path / method / who) for who in ("theirs", "ours")]
        for found in files:
            assert [tuple(t.shape) for t in found.tensors().values()] == [(N, sits)]
        mine, wanted = (
            json.loads((tmp_path / method / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")
        )
        about = ("peft_type", "num_virtual_tokens", "token_dim", "num_transformer_submodules")
        about += ("num_attention_heads", "num_layers") if method == "prefix" else ()
        assert {k: mine[k] for k in about} == {k: wanted[k] for k in about}
        assert {"num_attention_heads", "num_layers"} <= mine.keys()
        assert "target_modules" not in mine


def test_a_prompt_that_peft_began_with_a_text_is_read_without_its_tokenizer(tmp_path):
    theirs(make_net("llama"), "prompt").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "w3 w4", "tokenizer_name_or_path": "/gone"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **text}))
    assert read_adapter(tmp_path).spec == Prompt(n_tokens=N, start="text", start_text="w3 w4")


def test_a_prompt_for_another_width_is_refused(tmp_path):
    theirs(make_net("llama"), "prompt").save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"prompt:vectors has shape \(5, 32\), this model needs \(5, 16\)"):
        Model(make_net("opt")).attach(tmp_path)


# Encoders -------------------------------------------------------------------------------------------


def copied(model: Model, encoder: nn.Module) -> dict[str, Tensor]:
    """PEFT's encoder written into ours; for each of our parameters, PEFT's."""
    own = dict(encoder.named_parameters())
    layers = sorted({n.rpartition(".")[0] for n in own if n.startswith(("mlp_head.", "transform."))})
    pairs = {"E": own["embedding.weight"]} | {n.removeprefix("lstm_head."): t for n, t in own.items() if "lstm" in n}
    for number, layer in enumerate(layers, 1):
        pairs |= {f"W{number}": own[f"{layer}.weight"], f"b{number}": own[f"{layer}.bias"]}
    (params,) = model.adapters["default"].sites.values()
    if set(params) == {"vectors"}:
        pairs = {"vectors": own["embedding.weight"]}
    assert set(pairs) == set(params)
    with torch.no_grad():
        for name, value in params.items():
            value.copy_(pairs[name])
    return pairs


@pytest.mark.parametrize("method", METHODS)
def test_encoders_give_pefts_vectors_and_all_gradients_are_pefts(method):
    made = theirs(make_net("llama"), method)
    ours = Model(make_net("llama"))
    ours.attach(METHODS[method])
    pairs = copied(ours, made.prompt_encoder["default"])
    (site,) = ours.adapters["default"].sites
    params = ours.adapters["default"].sites[site]
    vectors = ours.adapters["default"].spec.vectors(params)
    torch.testing.assert_close(vectors.detach(), made.get_prompt_embedding_to_save("default"), rtol=RTOL, atol=ATOL)
    targets = IDS[:, 1:].reshape(-1)
    wanted = made(input_ids=IDS).logits[:, -IDS.shape[1] : -1]
    (summed_cross_entropy(wanted.reshape(len(targets), -1), targets) / len(targets)).backward()
    got = ours.logits(IDS)[:, :-1]
    (summed_cross_entropy(got.reshape(len(targets), -1), targets) / len(targets)).backward()
    for name, value in params.items():
        assert bool(value.grad.any()), name
        torch.testing.assert_close(value.grad, pairs[name].grad, rtol=RTOL, atol=ATOL)


def test_defaults_are_pefts():
    # as `_prepare_prompt_learning_config` fills them in: an encoder as wide as what it makes
    made = theirs(make_net("llama"), "ptuning", num_layers=2)
    assert made.peft_config["default"].encoder_num_layers == PTuning().depth
    assert made.peft_config["default"].encoder_dropout == PTuning().dropout
    for settings, config in (
        (PTuning(n_tokens=N), peft.PromptEncoderConfig),
        (PTuning(n_tokens=N, encoder="lstm"), lambda **m: peft.PromptEncoderConfig(
            encoder_reparameterization_type="LSTM", **m)),
        (PrefixTuning(n_tokens=N, projection=True), lambda **m: peft.PrefixTuningConfig(prefix_projection=True, **m)),
    ):  # fmt: skip
        full = peft.get_peft_model(make_net("llama"), config(num_virtual_tokens=N, task_type="CAUSAL_LM"))
        ours = Model(make_net("llama"))
        ours.attach(settings)
        copied(ours, full.prompt_encoder["default"])
