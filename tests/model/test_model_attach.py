"""Attach starts exactly at the base and detach gives it back bit for bit; a failed attach leaves no trace."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from deltaw import Full, Lora
from deltaw.errors import AdapterError, BaseError, NotFound, SpecError, TargetError
from deltaw.model.model import Model
from models import EMBEDDING, dense_logits, make_ids, make_net, randomise

IDS = make_ids()
# two ways to sum float32 products through two blocks: logits of order 1, some tens of roundings
ATOL = 1e-5


def tree(net: nn.Module) -> list[tuple[str, int]]:
    """Every module by path, as the very object it is, in order."""
    return [(name, id(module)) for name, module in net.named_modules(remove_duplicate=False)]


def everything(kind: str) -> Lora:
    """LoRA on every linear map, the embedding and the head, with every bias and the last norm."""
    embedding = EMBEDDING.get(kind, "embed_tokens")
    return Lora(rank=3, alpha=5, targets=rf".*(layers|h)\.\d.*|(.*\.)?({embedding}|lm_head)", bias="all")


@pytest.fixture
def kind(request, net) -> str:
    return request.node.callspec.params["net"]


@pytest.mark.parametrize("whole", [False, True], ids=["all-linear", "everything"])
def test_attach_starts_exactly_at_the_base(net, kind, whole):
    model = Model(net)
    base = model.logits(IDS)
    model.attach(everything(kind) if whole else Lora(rank=3, alpha=5))
    assert torch.equal(model.logits(IDS), base)


def test_attach_starts_exactly_at_the_base_where_the_maps_are_wide():
    # a matrix product cuts 1500 terms into blocks; a bias added in another block would show
    net = make_net("llama", hidden_size=1500, num_hidden_layers=1)
    net = make_net_again(net)
    model = Model(net)
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5))
    assert torch.equal(model.logits(IDS), base)


def make_net_again(net):
    """The same class at its config's present sizes, with random biases."""
    made = type(net)(net.config)
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn(value.shape, generator=rng) * value.shape[-1] ** -0.5)
    return made


def test_a_randomised_adapter_equals_the_dense_change(net, kind):
    model = Model(net)
    base = model.logits(IDS)
    model.attach(everything(kind))
    randomise(model)
    wanted = dense_logits(make_net(kind), model, {"default": 1.0}, IDS)
    got = model.logits(IDS)
    torch.testing.assert_close(got, wanted, rtol=ATOL, atol=3 * ATOL)  # logits up to 30 here
    assert float((got - base).detach().abs().max()) > 0.1


def test_detach_gives_back_logits_tensors_and_modules(net, kind):
    model = Model(net)
    base, before = model.logits(IDS), tree(net)
    values = {n: t.clone() for n, t in net.state_dict().items()}
    model.attach(everything(kind))
    randomise(model)
    rows = model.logits(IDS)
    rows.square().mean().backward()
    model.attach(Lora(rank=2, alpha=7, save_modules=["0"]), name="second")
    randomise(model, "second")
    assert not torch.equal(model.logits(IDS), base)
    model.detach()
    assert torch.equal(model.logits(IDS), base)
    assert tree(net) == before
    assert list(net.state_dict()) == list(values)
    assert all(torch.equal(t, values[n]) for n, t in net.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())


def test_detaching_one_of_two_leaves_the_other_as_it_was(net, kind):
    model = Model(net)
    before = tree(net)
    model.attach(everything(kind), name="first")
    randomise(model, "first")
    alone = model.logits(IDS)
    model.attach(Lora(rank=2, alpha=7), name="second")
    randomise(model, "second")
    model.detach("second")
    assert model.run.use == {}
    model.use("first")
    assert torch.equal(model.logits(IDS), alone)
    model.detach("first")
    assert tree(net) == before


@pytest.mark.parametrize("order", [("swap", "host"), ("host", "swap")])
@pytest.mark.parametrize("out", [("swap", "host"), ("host", "swap")])
def test_a_place_that_is_swapped_and_hosted_comes_back_whatever_the_order(llama, order, out):
    model = Model(llama)
    base, before = model.logits(IDS), tree(llama)
    specs = {
        "swap": Lora(rank=3, alpha=5, targets=["q_proj"], save_modules=["up_proj"]),
        "host": Lora(rank=3, alpha=5, targets=["up_proj"]),
    }
    alone = {}
    for name in order:
        model.attach(specs[name], name=name)
        randomise(model, name)
        alone[name] = model.logits(IDS)
    for name in specs:
        model.use(name)
        assert torch.equal(model.logits(IDS), alone[name])
    model.detach(out[0])
    model.use(out[1])
    assert torch.equal(model.logits(IDS), alone[out[1]])
    model.detach(out[1])
    assert tree(llama) == before
    assert torch.equal(model.logits(IDS), base)


def test_only_the_adapters_parameters_train(net, kind):
    model = Model(net)
    model.attach(everything(kind))
    randomise(model)
    trainable = model.trainable()
    model.logits(IDS).square().mean().backward()
    assert set(trainable) == set(model.adapters["default"].parameters())
    assert all(t.grad is not None and bool(t.grad.any()) for t in trainable.values())
    assert not any(p.grad is not None or p.requires_grad for p in net.parameters())
    assert not set(map(id, trainable.values())) & set(map(id, net.parameters()))


def test_parameters_stay_float32_on_a_bfloat16_base():
    model = Model(make_net("llama", dtype=torch.bfloat16))
    base = model.logits(IDS)
    model.attach(Lora(rank=3, alpha=5, bias="all", save_modules=["lm_head"]))
    assert {t.dtype for t in model.trainable().values()} == {torch.float32}
    assert model.logits(IDS).dtype == torch.bfloat16
    assert torch.equal(model.logits(IDS), base)


def test_no_weight_is_copied(llama):
    before = {n: t.data_ptr() for n, t in llama.named_parameters(remove_duplicate=False)}
    held = {n: m.weight.data_ptr() for n, m in llama.named_modules() if isinstance(m, nn.Linear)}
    model = Model(llama)
    for name in ("first", "second"):
        model.attach(Lora(rank=3, alpha=5), name=name)
    after = {n.replace(".original", ""): t.data_ptr() for n, t in llama.named_parameters(remove_duplicate=False)}
    assert after == before
    assert {n: model.places.weights[n].stored.data_ptr() for n in held} == held
    hosts = [m for m in llama.modules() if type(m).__name__ == "Host"]
    assert len(hosts) == 14
    assert {h.frozen.stored.data_ptr() for h in hosts} <= set(held.values())
    model.detach()
    assert {n: t.data_ptr() for n, t in llama.named_parameters(remove_duplicate=False)} == before


def test_attaching_a_taken_name_is_refused_and_changes_nothing(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5), name="legal")
    randomise(model)
    before, there = model.logits(IDS), tree(llama)
    with pytest.raises(AdapterError, match="An adapter called 'legal' is attached already"):
        model.attach(Lora(rank=2, alpha=7, targets=["lm_head"]), name="legal")
    assert torch.equal(model.logits(IDS), before)
    assert tree(llama) == there
    assert model.adapters["legal"].spec.rank == 3


def broken(adapter, change: str):
    """A finished adapter with one thing wrong."""
    sites = {s: dict(p) for s, p in adapter.sites.items()}
    first, second = list(sites)[:2]
    if change == "missing tensor":
        del sites[first]["B"]
    elif change == "missing place":
        del sites[first]
    elif change == "unknown place":
        sites["model.layers.0.self_attn.qq_proj"] = sites.pop(first)
    elif change == "misshapen":
        sites[first]["A"] = sites[first]["A"][:, :-1]
    elif change == "other rank":
        sites[first] = {"A": torch.ones(2, 32), "B": torch.ones(32, 2)}
    elif change == "too many":
        sites[second]["bias"] = torch.zeros(16)
    elif change == "nan":
        sites[second]["B"] = sites[second]["B"] * float("nan")
    elif change == "nan in a replacement":
        return replace(adapter, replaced=tuple(replace(r, value=r.value * float("nan")) for r in adapter.replaced))
    elif change == "misshapen replacement":
        return replace(adapter, replaced=tuple(replace(r, value=r.value[:-1]) for r in adapter.replaced))
    elif change == "unknown replacement":
        return replace(adapter, replaced=tuple(replace(r, tensor="model.nrom.weight") for r in adapter.replaced))
    elif change == "missing replacement":
        return replace(adapter, replaced=())
    return replace(adapter, sites=sites)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("missing tensor", r"model\.layers\.0\.self_attn\.q_proj lacks B"),
        ("missing place", r"no tensors for model\.layers\.0\.self_attn\.q_proj, which its settings target"),
        ("unknown place", r"no such place in this model: model\.layers\.0\.self_attn\.qq_proj.*Did you mean"),
        ("misshapen", r"q_proj:A has shape \(3, 31\), this model needs \(3, 32\)"),
        ("other rank", r"q_proj:A has shape \(2, 32\), this model needs \(3, 32\)"),
        ("too many", r"k_proj has bias, which its settings do not ask for"),
        ("nan", r"k_proj holds NaN or Inf in B"),
        ("nan in a replacement", r"lm_head\.weight holds NaN or Inf"),
        ("misshapen replacement", r"lm_head\.weight has shape \(52, 32\), this model's is \(53, 32\)"),
        ("unknown replacement", r"it replaces model\.nrom\.weight, which this model does not have"),
        ("missing replacement", r"no tensors? for lm_head\.weight"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_changes_nothing(llama, change, said):
    model = Model(llama)
    spec = Lora(rank=3, alpha=5, targets=["q_proj", "k_proj"], save_modules=["lm_head"])
    model.attach(spec, name="kept")
    randomise(model)
    before, there = model.logits(IDS), tree(llama)
    with pytest.raises(AdapterError, match=said):
        model.attach(broken(model.adapter(), change), name="broken")
    assert torch.equal(model.logits(IDS), before)
    assert tree(llama) == there
    assert list(model.adapters) == ["kept"]
    assert model.run.use == {"kept": 1.0}


def test_every_misfit_is_listed_at_once(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, targets=["q_proj", "k_proj"]))
    adapter = broken(broken(model.adapter(), "misshapen"), "nan")
    with pytest.raises(AdapterError, match=r"q_proj:A has shape .*; .*k_proj holds NaN"):
        Model(make_net("llama")).attach(adapter)


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        (Lora(targets=["nothing"]), TargetError),
        (Lora(save_modules=["nothing"]), TargetError),
        (Lora(layers=[9]), TargetError),
        (Lora(new_tokens=["<a>"]), BaseError),  # there is no tokenizer
    ],
)
def test_settings_that_do_not_fit_leave_the_model_as_it_was(llama, spec, error):
    model = Model(llama)
    base, before = model.logits(IDS), tree(llama)
    with pytest.raises(error):
        model.attach(spec)
    assert torch.equal(model.logits(IDS), base)
    assert tree(llama) == before
    assert model.adapters == {}
    assert model.run.use == {}


def test_a_finished_adapter_is_a_copy_that_does_not_follow_the_live_one(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5))
    randomise(model)
    finished = model.adapter()
    first = finished.id
    randomise(model, seed=2)
    assert finished.id == first
    assert model.adapter().id != first
    other = Model(make_net("llama"))
    other.attach(finished)
    assert other.trainable() == {}
    assert not other.logits(IDS).requires_grad


def test_a_finished_adapter_goes_on_training_only_when_asked(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, save_modules=["lm_head"], bias="all"))
    untouched = model.adapter()  # its replaced tensors still equal the base's: they must train all the same
    again = Model(make_net("llama"))
    again.attach(untouched, trainable=True)
    assert set(again.trainable()) == set(model.trainable())
    again.logits(IDS).square().mean().backward()
    assert again.trainable()["replace:lm_head.weight"].grad.abs().max() > 0
    assert again.adapter().id == untouched.id


def test_attaching_does_not_change_the_adapter_it_was_given(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, targets=["q_proj"]))
    adapter = model.adapter()
    other = Model(make_net("llama"))
    other.attach(adapter, trainable=True)
    randomise(other)
    assert adapter.id == model.adapter().id
    assert not any(t.requires_grad for t in adapter.tensors().values())


def test_fresh_parameters_depend_on_the_seed_alone(llama):
    ids = []
    for seed in (0, 0, 1):
        model = Model(make_net("llama"))
        torch.manual_seed(len(ids))
        model.attach(Lora(rank=3, alpha=5), seed=seed)
        ids.append(model.adapter().id)
    assert ids[0] == ids[1] != ids[2]


def test_attaching_leaves_torchs_own_random_stream_alone(llama):
    before = torch.get_rng_state()
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, dropout=0.5))
    model.run.seed = 3
    model.logits(IDS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fully_trained_base_refuses_detach_and_company(llama):
    model = Model(llama)
    base = model.logits(IDS)
    model.attach(Full())
    assert torch.equal(model.logits(IDS), base)
    assert set(model.trainable()) == {n for n, _ in llama.named_parameters()}
    with pytest.raises(AdapterError, match="load the base again"):
        model.detach()
    with pytest.raises(AdapterError, match="nothing can be attached"):
        model.attach(Lora(rank=3), name="more")


def test_full_training_is_refused_beside_an_adapter(llama):
    model = Model(llama)
    model.attach(Lora(rank=3))
    with pytest.raises(AdapterError, match="detach the other adapters first"):
        model.attach(Full(), name="full")
    assert not any(p.requires_grad for p in llama.parameters())


def test_unknown_names_are_refused_with_near_ones(llama):
    model = Model(llama)
    model.attach(Lora(rank=3), name="legal")
    with pytest.raises(NotFound, match=r"No adapter 'leagl' is attached\. Did you mean 'legal'"):
        model.detach("leagl")
    with pytest.raises(NotFound, match="Did you mean 'legal'"):
        model.use({"legall": 1.0})
    assert model.run.use == {"legal": 1.0}
    model.use(None)
    with pytest.raises(SpecError, match="Say which adapter is meant; in use: none"):
        model.adapter()
