"""Embeddings and heads, tied or not: LoRA on them, whole modules saved, new tokens, dropout."""

from __future__ import annotations

import pytest
import torch

from deltaw import Lora
from deltaw.errors import AdapterError, BaseError, SpecError
from deltaw.model.model import Model
from deltaw.store.peft import write_adapter
from models import EMBEDDING, HIDDEN, VOCAB, dense_logits, make_ids, make_net, make_tokenizer, randomise

IDS = make_ids()
NEW = torch.tensor([[1, VOCAB, 7, VOCAB + 1, 3, VOCAB]])


def largest(t: torch.Tensor) -> float:
    return float(t.detach().abs().max())


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def net(request):
    made = make_net("llama", tie_word_embeddings=request.param)
    assert (made.lm_head.weight is made.model.embed_tokens.weight) == request.param
    return made


@pytest.fixture
def tied(net) -> bool:
    return bool(net.config.tie_word_embeddings)


# LoRA and whole modules ------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_lora_on_embedding_and_head_changes_each_side_on_its_own(net, tied, targets):
    model = Model(net)
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5, targets=targets))
    assert torch.equal(model.logits(IDS), base)
    randomise(model)
    wanted = dense_logits(make_net("llama", tie_word_embeddings=tied), model, {"default": 1.0}, IDS)
    # one low-rank product beside a dense one: 1e-5 of the largest logit
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=1e-5 * largest(wanted))
    assert largest(model.logits(IDS) - base) > 0.1
    model.logits(IDS).square().mean().backward()
    assert all(bool(t.grad.any()) for t in model.trainable().values())
    model.detach()
    assert torch.equal(model.logits(IDS), base)
    assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied


def test_only_looked_up_columns_of_an_embeddings_a_get_gradients(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, targets=["embed_tokens"]))
    randomise(model)
    model.logits(IDS).square().mean().backward()
    grad = model.trainable()["model.embed_tokens:A"].grad
    seen = torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, IDS.flatten(), True)
    assert torch.equal(grad.abs().sum(0) > 0, seen)


@pytest.mark.parametrize(
    "modules", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["model.norm"], ["mlp"]], ids=str
)
def test_saved_modules_train_whole_and_the_base_stays(net, tied, modules):
    model = Model(net)
    base = model.logits(IDS)
    weights = {n: t.clone() for n, t in net.state_dict().items()}
    model.attach(Lora(rank=3, alpha=5, targets=["q_proj"], save_modules=modules))
    assert torch.equal(model.logits(IDS), base)
    randomise(model)
    fresh_net = make_net("llama", tie_word_embeddings=tied)
    wanted = dense_logits(fresh_net, model, {"default": 1.0}, IDS)
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=1e-5 * largest(wanted))
    model.logits(IDS).square().mean().backward()
    inside = {n for n, _ in fresh_net.named_parameters(remove_duplicate=False)
              if any(f".{m}." in f".{n}" for m in modules)}  # fmt: skip
    assert {k.removeprefix("replace:") for k in model.trainable() if k.startswith("replace:")} == inside
    assert all(bool(t.grad.any()) for t in model.trainable().values())
    model.detach()
    assert torch.equal(model.logits(IDS), base)
    assert all(torch.equal(t, weights[n]) for n, t in net.state_dict().items())


def test_a_saved_module_is_found_while_another_adapter_sits_inside_it(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5), name="first")
    model.attach(Lora(rank=3, alpha=5, targets=["q_proj"], save_modules=["mlp"]), name="second")
    names = {n for n, _ in make_net("llama").named_parameters() if ".mlp." in n}
    assert set(model.adapters["second"].swaps) == names


def test_a_saved_head_with_a_bias_beside_trained_biases():
    net = make_net("phi")
    model = Model(net)
    model.attach(Lora(rank=3, alpha=5, bias="all", save_modules=["lm_head"]))
    randomise(model)
    wanted = dense_logits(make_net("phi"), model, {"default": 1.0}, IDS)
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=1e-5 * largest(wanted))


def test_settings_reach_the_biases_they_name_and_no_other():
    names = {}
    for bias in ("none", "lora_only", "all"):
        model = Model(make_net("llama"))
        model.attach(Lora(rank=3, alpha=5, targets=["q_proj", "up_proj"], bias=bias))
        names[bias] = {k.replace("replace:", "").replace(":", ".") for k in model.trainable() if k.endswith("bias")}
    linear = {n for n, _ in make_net("llama").named_parameters() if n.endswith("bias")}
    assert names["none"] == set()
    assert names["lora_only"] == {n for n in linear if "q_proj" in n or "up_proj" in n}
    assert names["all"] == linear
    model = Model(make_net("gpt2"))
    model.attach(Lora(rank=3, alpha=5, targets=["c_attn"], bias="all"))
    biases = {n for n, _ in make_net("gpt2").named_parameters() if n.endswith("bias")}
    assert {k.replace("replace:", "").replace(":", ".") for k in model.trainable() if k.endswith("bias")} == biases
    assert "transformer.ln_f.bias" in biases


# New tokens -------------------------------------------------------------------------------------------


@pytest.fixture(params=["llama tied", "llama", "phi", "gpt2", "gemma2", "gpt_neox", "opt"])
def wide(request) -> tuple[str, Model]:
    """A model with a tokenizer; tied heads, untied ones, one with a bias, one with a soft cap."""
    return request.param, Model(remake(request.param), make_tokenizer())


def remake(kind: str):
    return make_net(kind.split()[0], **({"tie_word_embeddings": True} if kind.endswith("tied") else {}))


def test_new_tokens_add_columns_and_leave_old_ones_alone(wide):
    _, model = wide
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5, new_tokens=["<a>", "<b>"]))
    logits = model.logits(IDS)
    assert logits.shape == (*IDS.shape, VOCAB + 2)
    assert torch.equal(logits[..., :VOCAB], base)
    assert bool(logits.isfinite().all())
    assert model.tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [VOCAB, VOCAB + 1]
    assert model.tokenizer("w3 <a> w4")["input_ids"] == [3, VOCAB, 4]
    model.detach()
    assert torch.equal(model.logits(IDS), base)
    assert model.tokenizer("<a>")["input_ids"] != [VOCAB]


def test_only_the_new_rows_train(wide):
    _, model = wide
    model.attach(Lora(rank=3, alpha=5, targets=r".*\.1\..*", new_tokens=["<a>", "<b>"]))
    rows = {k: t for k, t in model.trainable().items() if k.startswith("rows:")}
    tied = bool(model.net.config.tie_word_embeddings)
    assert len(rows) == (1 if tied else 2)
    assert {t.shape[0] for t in rows.values()} == {2}
    model.logits(NEW).square().mean().backward()
    assert all(bool(t.grad.any(1).all()) for t in rows.values())
    assert not any(p.grad is not None for p in model.net.parameters())


def test_new_rows_compute_as_a_base_with_a_larger_vocabulary(wide):
    kind, model = wide
    model.attach(Lora(rank=3, alpha=5, new_tokens=["<a>", "<b>"]))
    randomise(model)
    got = model.logits(NEW)

    other = remake(kind)
    other.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
    with torch.no_grad():
        for key, (ids, value) in model.adapters["default"].rows.items():
            dict(other.named_parameters(remove_duplicate=False))[key][ids] = value
        if getattr(other.get_output_embeddings(), "bias", None) is not None:
            other.get_output_embeddings().bias[VOCAB:] = 0
    sites = model.adapters["default"].sites
    larger = Model(other)
    larger.attach(Lora(rank=3, alpha=5))
    for site, params in larger.adapters["default"].sites.items():
        for part, tensor in params.items():
            tensor.data.copy_(sites[site][part])
    # the same products, the head's split into old and new columns
    torch.testing.assert_close(got, larger.logits(NEW), rtol=0, atol=1e-5 * largest(got))


def test_a_token_that_the_tokenizer_knew_starts_at_its_present_row(wide):
    kind, model = wide
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5))
    assert model.add_tokens(["w5", "<a>"]) == [5, VOCAB]
    logits = model.logits(IDS)
    # the swapped column is computed by itself: the same 32 products summed in another order
    torch.testing.assert_close(logits[..., :VOCAB], base, rtol=0, atol=1e-5)
    rows = next(t for k, t in model.trainable().items() if k.startswith("rows:"))
    with torch.no_grad():
        rows[0] += torch.linspace(-1, 1, rows.shape[1]) ** 3
    changed = model.logits(torch.tensor([[5, 6]]))[0, :, :VOCAB] - Model(remake(kind)).logits(torch.tensor([[5, 6]]))[0]
    assert largest(changed[0]) > 0.01


def test_new_tokens_are_saved_and_come_back(wide, tmp_path):
    kind, model = wide
    model.attach(Lora(rank=3, alpha=5), name="words")
    model.add_tokens(["<a>", "<b>"])
    randomise(model)
    wanted = model.logits(NEW)
    write_adapter(model.adapter(), tmp_path / "a")
    again = Model(remake(kind), make_tokenizer())
    again.attach(tmp_path / "a")
    assert torch.equal(again.logits(NEW), wanted)
    assert again.tokenizer("<b>")["input_ids"] == [VOCAB + 1]
    assert again.adapter().id == model.adapter().id
    assert again.adapters["default"].spec.new_tokens == ("<a>", "<b>")


def test_new_tokens_of_another_adapter_under_the_same_ids_are_refused(tmp_path):
    for name in ("one", "two"):
        model = Model(make_net("llama"), make_tokenizer())
        model.attach(Lora(rank=3, alpha=5, new_tokens=[f"<{name}>"]))
        write_adapter(model.adapter(), tmp_path / name)
    both = Model(make_net("llama"), make_tokenizer())
    both.attach(tmp_path / "one", name="one")
    before = both.logits(IDS)
    with pytest.raises(AdapterError, match=r"<two>.*54.*53"):
        both.attach(tmp_path / "two", name="two")
    assert torch.equal(both.logits(IDS), before)
    assert max(both.tokenizer("<two>")["input_ids"]) < VOCAB
    assert list(both.adapters) == ["one"]


@pytest.mark.parametrize("tokens", [["<a>", "<a>"], [" "], [""]], ids=str)
def test_blank_or_repeated_tokens_are_refused(tokens):
    model = Model(make_net("llama"), make_tokenizer())
    with pytest.raises(SpecError, match="new_tokens must be distinct and not blank"):
        model.attach(Lora(rank=3, new_tokens=tokens))
    assert model.adapters == {}


def test_new_tokens_without_a_tokenizer_are_refused(llama):
    model = Model(llama)
    model.attach(Lora(rank=3))
    with pytest.raises(BaseError, match="New tokens need a tokenizer"):
        model.add_tokens(["<a>"])


def test_a_finished_adapter_takes_no_new_tokens():
    model = Model(make_net("llama"), make_tokenizer())
    model.attach(Lora(rank=3, new_tokens=["<a>"]))
    with pytest.raises(AdapterError, match="has added tokens already"):
        model.add_tokens(["<b>"])
    finished = model.adapter()
    model.detach()
    model.attach(finished)
    with pytest.raises(AdapterError, match="not trainable"):
        model.add_tokens(["<b>"])


def test_an_adapter_with_vocabulary_of_its_own_is_not_summed():
    model = Model(make_net("llama"), make_tokenizer())
    model.attach(Lora(rank=3, new_tokens=["<a>"]), name="words")
    model.attach(Lora(rank=2), name="other")
    with pytest.raises(AdapterError, match="'words' has vocabulary of its own"):
        model.use({"words": 1.0, "other": 1.0})
    with pytest.raises(AdapterError, match="'words' has vocabulary of its own"):
        model.use({"words": 0.5})
    assert model.run.use == {"other": 1.0}


# Dropout ----------------------------------------------------------------------------------------------


def dropped(seed: int | None, name: str = "llama") -> torch.Tensor:
    model = Model(make_net(name))
    model.attach(Lora(rank=3, alpha=5, dropout=0.4))
    randomise(model)
    model.run.seed = seed
    return model.logits(IDS)


def test_dropout_is_a_function_of_the_seed():
    torch.manual_seed(1)
    first = dropped(3)
    torch.manual_seed(2)
    assert torch.equal(dropped(3), first)
    assert not torch.equal(dropped(4), first)


def test_dropout_is_off_outside_training(net):
    assert torch.equal(dropped(None), without_dropout())


def without_dropout() -> torch.Tensor:
    model = Model(make_net("llama"))
    model.attach(Lora(rank=3, alpha=5))
    randomise(model)
    model.run.seed = 3
    return model.logits(IDS)


def test_dropout_of_the_base_is_never_applied(net):
    for kind in ("phi", "gpt2", "opt", "gpt_neox", "llama"):
        model = Model(make_net(kind).train())
        model.attach(Lora(rank=3, alpha=5))
        model.run.seed = 3
        assert torch.equal(model.logits(IDS), model.logits(IDS))
        assert torch.equal(model.logits(IDS), Model(make_net(kind)).logits(IDS))


def test_dropout_zeroes_its_share_and_keeps_the_mean(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, dropout=0.4))
    model.run.seed = 3
    hosts = [m for m in llama.modules() if type(m).__name__ == "Host"]
    x = torch.ones(200, HIDDEN)
    kept = [h._keep(x, 0.4) for h in hosts[:2]]
    for mask in kept:
        assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1.0) / (1 - 0.4))}
        # the share of 6400 coin flips deviates by sqrt(.24 / 6400) = 0.006; seven times that
        assert abs(float((mask == 0).float().mean()) - 0.4) < 0.043
    assert not torch.equal(*kept)


def test_gradients_see_the_same_mask_as_the_forward(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, dropout=0.4, targets=["model.layers.1.mlp.down_proj"]))
    randomise(model)
    model.run.seed = 3
    host = llama.model.layers[1].mlp.down_proj
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(1))
    A, B = model.trainable().values()
    wanted = host.original(x) + 5 / 3 * (x * host._keep(x, 0.4)) @ A.T @ B.T
    torch.testing.assert_close(host(x), wanted, rtol=0, atol=1e-5)  # sums of 40 products of order 1
    got = torch.autograd.grad(host(x).square().sum(), [A, B])
    for grad, want in zip(got, torch.autograd.grad(wanted.square().sum(), [A, B]), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5 * largest(want))


def test_heads_and_embeddings_are_named_as_the_architecture_names_them():
    for kind in ("llama", "gpt2", "gpt_neox"):
        sites = Model(make_net(kind)).places.sites
        heads = [n for n, s in sites.items() if s.is_head]
        assert [h.rsplit(".", 1)[-1] for h in heads] == ["lm_head"]
        assert any(n.endswith(EMBEDDING.get(kind, "embed_tokens")) and s.kind == "embedding" for n, s in sites.items())


def test_dropout_of_a_weighted_set_is_that_of_its_members(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, dropout=0.4))
    randomise(model)
    host = model.places.modules["model.layers.0.mlp"].down_proj
    x = torch.randn(2, 7, host.site.in_features, generator=torch.Generator().manual_seed(1))
    base = host.original(x)
    model.run.seed = 9
    whole = host(x)
    model.use({"default": 0.5})
    # x of order 1 through 40 terms: float32 roundings
    torch.testing.assert_close(host(x), base + 0.5 * (whole - base), rtol=0, atol=1e-5)
    model.run.seed = None
    assert not torch.allclose(host(x), base + 0.5 * (whole - base), atol=1e-3)
