"""Virtual tokens from their settings: how they start, what is saved of them, what they are refused beside."""

from __future__ import annotations

import json

import pytest
import torch
from wearing import METHODS, N, wear

from deltaw import Lora
from deltaw.core.site import VirtualSite
from deltaw.core.spec import Start
from deltaw.errors import AdapterError, NotMergeable, SpecError
from deltaw.merge.bake import bake
from deltaw.methods import PrefixTuning, Prompt, PTuning, spec_from
from deltaw.model.model import Model
from deltaw.model.virtual import padded_logits
from deltaw.store.peft import read_adapter, write_adapter
from models import HIDDEN, VOCAB, make_ids, make_net, make_tokenizer, randomise

IDS = make_ids()


def vectors(model: Model) -> torch.Tensor:
    (params,) = model.adapters["default"].sites.values()
    return params["vectors"].detach()


# Starts ---------------------------------------------------------------------------------------------


def test_a_random_prompt_is_uniform_and_a_function_of_its_seed():
    found = []
    for seed in (1, 1, 2):
        model = Model(make_net("llama"))
        model.attach(Prompt(n_tokens=40, start="random"), seed=seed)
        found.append(vectors(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[0].shape == (40, HIDDEN)
    assert 0.49 < float(found[0].abs().max()) <= 0.5
    assert float(found[0].var()) == pytest.approx(1 / 12, rel=0.1)  # 1280 draws


@pytest.mark.parametrize("kind", ["llama", "gemma", "opt"])
def test_a_prompt_from_the_vocabulary_is_rows_as_the_base_reads_them(kind):
    model = Model(make_net(kind))
    model.attach(Prompt(n_tokens=N, start="vocabulary"), seed=3)
    with torch.no_grad():
        rows = make_net(kind).get_input_embeddings()(torch.arange(VOCAB))  # Gemma scales them
    hits = [[int(i) for i in range(VOCAB) if torch.allclose(v, rows[i], atol=1e-6)] for v in vectors(model)]
    assert all(len(h) == 1 for h in hits)
    assert len({h[0] for h in hits}) > 1


@pytest.mark.parametrize(("text", "ids"), [("w3 w9", [3, 9, 3, 9, 3]), ("w1 w2 w3 w4 w5 w6 w7", [1, 2, 3, 4, 5])])
def test_a_prompt_from_a_text_is_its_tokens_repeated_or_cut(text, ids):
    model = Model(make_net("gemma"), make_tokenizer())
    model.attach(Prompt(n_tokens=N, start="text", start_text=text))
    bare = Model(make_net("gemma"))
    with torch.no_grad():
        torch.testing.assert_close(vectors(model), bare.net.get_input_embeddings()(torch.tensor(ids)))
        whole = bare.logits(torch.cat([torch.tensor(ids).expand(2, -1), IDS], 1))[:, N:]
        torch.testing.assert_close(model.logits(IDS), whole, rtol=0, atol=1e-5)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(SpecError, match="needs a tokenizer"):
        Model(make_net("llama")).attach(Prompt(start="text", start_text="w3"))
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    for text in (" ", "more"):
        with pytest.raises(SpecError, match="has no tokens that this base has embeddings for"):
            Model(make_net("llama"), tokenizer).attach(Prompt(start="text", start_text=text))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_from_its_seed_and_from_nothing_else(method):
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(found))
        model = Model(make_net("llama"))
        model.attach(METHODS[method], seed=seed)
        found.append(model.logits(IDS).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("method", METHODS)
def test_two_stacks_ask_for_vectors_of_each(method):
    spec = METHODS[method]
    if spec.sits == "cache":
        return
    site = VirtualSite("prompt", "input", 12, stacks=2)
    params = spec.init(site, Start(torch.Generator().manual_seed(1)))
    form = spec.lower(site, params, None)
    assert form.inputs.shape == (2, N, 12)
    assert form.n == N


# Settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Prompt(n_tokens=0), "must be at least 1"),
        (lambda: Prompt(start="text"), "give both or none"),
        (lambda: Prompt(start_text="w1"), "give both or none"),
        (lambda: Prompt(start="words"), "start"),
        (lambda: Prompt(targets="q_proj"), "remove targets"),
        (lambda: Prompt(layers="0-1"), "remove exclude and layers"),
        (lambda: PrefixTuning(hidden=7, projection=False), "set projection = true"),
        (lambda: PrefixTuning(projection=True, hidden=0), "at least 1"),
        (lambda: PTuning(encoder="none", hidden=5), "width of an encoder"),
        (lambda: PTuning(depth=3), "are the LSTM's"),
        (lambda: PTuning(dropout=0.1), "are the LSTM's"),
        (lambda: PTuning(encoder="lstm", dropout=1.0), "dropout below 1"),
        (lambda: PTuning(encoder="lstm", depth=1, dropout=0.5), "between two layers"),
        (lambda: PTuning(encoder="gru"), "encoder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(make, said):
    with pytest.raises(SpecError, match=said):
        make()


# Saving ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_vectors_alone_are_saved_and_compute_the_same(method, tmp_path):
    model = wear("llama", method)
    wanted = model.logits(IDS)
    adapter = model.adapter()
    assert list(adapter.tensors()) == ["prefix:vectors" if "prefix" in method else "prompt:vectors"]
    assert spec_from(json.loads(adapter.spec.model_dump_json())) == adapter.spec
    adapter.save(tmp_path)
    assert read_adapter(tmp_path).id == adapter.id
    again = Model(make_net("llama"))
    again.attach(tmp_path, trainable=True)
    torch.testing.assert_close(again.logits(IDS), wanted, rtol=0, atol=1e-5)  # an LSTM rounds otherwise under no_grad
    assert sum(t.numel() for t in again.trainable().values()) == adapter.n_parameters
    assert model.adapters["default"].spec == METHODS[method], "the encoder trains on"


def test_an_adapter_read_from_peft_and_written_again_loses_nothing(tmp_path):
    adapter = wear("llama", "prefix").adapter()
    write_adapter(adapter, tmp_path / "ours")
    (tmp_path / "ours" / "deltaw.json").unlink()
    foreign = read_adapter(tmp_path / "ours")
    write_adapter(foreign, tmp_path / "again")
    for folder in ("ours", "again"):
        model = Model(make_net("llama"))
        model.attach(tmp_path / folder)
        assert torch.equal(model.logits(IDS), wear("llama", "prefix").logits(IDS))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_whole_modules_and_new_tokens_train_and_are_saved_beside_them(method, tmp_path):
    more = {"save_modules": ("model.norm", "lm_head")}, {"new_tokens": ("new",)}
    for number, settings in enumerate(more):
        model = Model(make_net("llama"), make_tokenizer())
        model.attach(METHODS[method].model_copy(update=settings))
        randomise(model)
        ids = IDS.clone()
        if "new_tokens" in settings:
            ids[0, 3] = VOCAB
        logits = model.logits(ids)
        logits.logsumexp(-1).sum().backward()
        assert all(bool(t.grad.any()) for t in model.trainable().values())
        assert len(model.trainable()) == 3
        model.adapter().save(tmp_path / str(number))
        again = Model(make_net("llama"), make_tokenizer())
        again.attach(tmp_path / str(number))
        assert torch.equal(again.logits(ids), logits)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parity
def test_whole_modules_beside_them_are_pefts_both_ways(method, tmp_path):
    peft = pytest.importorskip("peft")
    make = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[method]
    config = make(num_virtual_tokens=N, task_type="CAUSAL_LM", modules_to_save=["lm_head", "model.norm"])
    theirs = peft.get_peft_model(make_net("llama"), config).eval()
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for value in theirs.parameters():
            value += 0.3 * torch.randn(value.shape, generator=rng) if value.requires_grad else 0.0
        wanted = theirs(input_ids=IDS).logits[:, -IDS.shape[1] :]
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Model(make_net("llama"))
    ours.attach(tmp_path / "theirs")
    torch.testing.assert_close(ours.logits(IDS), wanted, rtol=1e-5, atol=1e-5)
    ours.adapter().save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(make_net("llama"), tmp_path / "ours").eval()
    with torch.no_grad():
        found = back(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# Beside other adapters --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_virtual_tokens_are_used_alone_with_weight_one(method):
    model = wear("llama", method)
    alone = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5), name="lora")
    model.attach(METHODS[method], name="other", seed=5)
    for wanted in ({"default": 1.0, "lora": 0.5}, {"default": 0.5}, {"default": 1.0, "other": 1.0}):
        with pytest.raises(AdapterError, match=rf"'default' \(method '{method}'\) is virtual tokens .* with weight 1"):
            model.use(wanted)
    model.use("other")
    assert not torch.equal(model.logits(IDS), alone)
    model.use({"default": 1.0})
    assert torch.equal(model.logits(IDS), alone)
    model.detach("default")
    model.use("lora")
    assert model.front() is None
    assert model.n_before == 0


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_they_cannot_be_merged_and_say_so(method, tmp_path):
    with pytest.raises(NotMergeable, match=method):
        bake(tmp_path / "base", wear("llama", method).adapter(), tmp_path / "out")


def test_layers_that_share_keys_and_values_are_refused_by_name():
    model = wear("llama", "prefix")
    model.net.config.num_kv_shared_layers = 1
    with pytest.raises(AdapterError, match=r"layers of this model share theirs\. Use method 'prompt'"):
        model.logits(IDS)


def test_a_forward_in_front_of_which_nothing_stands_is_the_models_own():
    net = make_net("llama")
    with torch.no_grad():
        assert torch.equal(padded_logits(net, None, IDS), net(input_ids=IDS).logits)
