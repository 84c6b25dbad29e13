"""Several adapters: one, a weighted set or none in use, without a weight copied or a name confused."""

from __future__ import annotations

import pytest
import torch

from deltaw import Lora
from deltaw.errors import AdapterError
from deltaw.model.model import Model
from models import EMBEDDING, dense_logits, make_ids, make_net, randomise

IDS = make_ids()


@pytest.fixture
def kind(request, net) -> str:
    return request.node.callspec.params["net"]


def wear_two(net, kind: str) -> Model:
    """Two adapters of different rank, scale and place; embedding, head and biases included."""
    embedding = EMBEDDING.get(kind, "embed_tokens")
    model = Model(net)
    model.attach(
        Lora(rank=3, alpha=5, targets=rf".*(layers|h)\.\d.*|(.*\.)?({embedding}|lm_head)", bias="all"), name="legal"
    )
    model.attach(Lora(rank=2, alpha=7, rslora=True, rank_pattern={embedding: 5}, targets=rf".*\.{embedding}|.*\.1\..*"),
                 name="code")  # fmt: skip
    randomise(model, "legal", seed=1, size=0.2)
    randomise(model, "code", seed=2, size=0.2)
    return model


@pytest.mark.parametrize(
    "weights",
    [{"legal": 1.0, "code": 1.0}, {"legal": 1.0, "code": 0.5}, {"legal": 0.3, "code": -0.7}, {"code": -1.0}],
    ids=str,
)
def test_a_weighted_set_is_the_base_plus_the_sum_of_dense_deltas(net, kind, weights):
    model = wear_two(net, kind)
    model.use(weights)
    wanted = dense_logits(make_net(kind), model, weights, IDS)
    # 1e-5 of the largest logit: two blocks of float32 sums in another order
    most = float(wanted.abs().max())
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=1e-5 * max(1.0, most))


def test_each_alone_is_what_it_was_and_none_is_the_base(net, kind):
    base = Model(make_net(kind)).logits(IDS)
    model = wear_two(net, kind)
    for name in ("legal", "code"):
        model.use(name)
        wanted = dense_logits(make_net(kind), model, {name: 1.0}, IDS)
        most = float(wanted.abs().max())
        torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=1e-5 * max(1.0, most))
    model.use(None)
    assert torch.equal(model.logits(IDS), base)
    model.use({})
    assert torch.equal(model.logits(IDS), base)


def test_a_weight_of_zero_is_the_base(llama):
    base = Model(make_net("llama")).logits(IDS)
    model = wear_two(llama, "llama")
    model.use({"legal": 0.0})
    torch.testing.assert_close(model.logits(IDS).detach(), base, rtol=0, atol=1e-6)


def test_switching_copies_nothing_and_keeps_every_tensor(llama):
    model = wear_two(llama, "llama")
    held = {n: (t.data_ptr(), t._version) for a in model.adapters.values() for n, t in a.parameters().items()}
    base = {n: (t.data_ptr(), t._version) for n, t in llama.named_parameters()}
    for which in ("legal", "code", {"legal": 1.0, "code": 0.5}, None, "legal"):
        model.use(which)
        model.logits(IDS)
    assert held == {n: (t.data_ptr(), t._version) for a in model.adapters.values() for n, t in a.parameters().items()}
    assert base == {n: (t.data_ptr(), t._version) for n, t in llama.named_parameters()}


def test_names_that_are_parts_of_each_other_stay_apart(llama):
    names = ["default", "default2", "other_default", "foodefault_bar", "efaul"]
    model = Model(llama)
    alone = {}
    for i, name in enumerate(names):
        model.attach(Lora(rank=3, alpha=5), name=name)
        randomise(model, name, seed=i + 1)
        alone[name] = model.logits(IDS).detach()
    assert len({tuple(t.flatten().tolist()) for t in alone.values()}) == len(names)
    for name in names:
        model.use(name)
        assert torch.equal(model.logits(IDS), alone[name])
    model.detach("default")
    for name in names[1:]:
        model.use(name)
        assert torch.equal(model.logits(IDS), alone[name])
    trainable = model.trainable()
    assert len(trainable) == 4 * 28
    assert {key.split("/")[0] for key in trainable} == set(names[1:])


def test_only_adapters_in_use_get_gradients(llama):
    model = wear_two(llama, "llama")
    model.use("code")
    model.logits(IDS).sum().backward()
    assert all(t.grad is not None for t in model.adapters["code"].parameters().values())
    assert all(t.grad is None for t in model.adapters["legal"].parameters().values())


def test_gradients_of_a_set_are_those_of_the_dense_sum(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, targets=["up_proj"]), name="a")
    model.attach(Lora(rank=2, alpha=7, targets=["up_proj"]), name="b")
    randomise(model, "a", seed=1)
    randomise(model, "b", seed=2)
    model.use({"a": 0.5, "b": -2.0})
    (model.logits(IDS).square().mean()).backward()

    net = make_net("llama")
    leaves = {n: {s: {p: t.detach().clone().requires_grad_() for p, t in ps.items()} for s, ps in a.sites.items()}
              for n, a in model.adapters.items()}  # fmt: skip
    tensors = dict(net.named_parameters())
    for name, weight in (("a", 0.5 * 5 / 3), ("b", -2.0 * 7 / 2)):
        for site, p in leaves[name].items():
            tensors[f"{site}.weight"] = tensors[f"{site}.weight"] + weight * p["B"] @ p["A"]
    torch.func.functional_call(net, tensors, (IDS,), {"use_cache": False}).logits.square().mean().backward()
    for name, made in model.adapters.items():
        for site, params in made.sites.items():
            for part, tensor in params.items():
                wanted = leaves[name][site][part].grad
                torch.testing.assert_close(tensor.grad, wanted, rtol=1e-4, atol=1e-6)  # gradients of order 0.01


def test_replaced_modules_take_part_in_a_sum(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, targets=["q_proj"], save_modules=["lm_head", "model.norm"]), name="a")
    model.attach(Lora(rank=2, alpha=7, targets=["v_proj"], save_modules=["lm_head"]), name="b")
    randomise(model, "a", seed=1)
    randomise(model, "b", seed=2)
    weights = {"a": 0.5, "b": 2.0}
    model.use(weights)
    wanted = dense_logits(make_net("llama"), model, weights, IDS)
    torch.testing.assert_close(model.logits(IDS).detach(), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_sum_that_does_not_exist_is_refused_and_the_use_stays(llama):
    model = Model(llama)
    model.attach(Lora(rank=3, alpha=5, targets=["q_proj"], save_modules=["lm_head"]), name="a")
    model.attach(Lora(rank=2, alpha=7, targets=["lm_head"]), name="b")
    with pytest.raises(AdapterError, match=r"'a' replaces lm_head\.weight, where 'b' has a change"):
        model.use({"a": 1.0, "b": 1.0})
    assert model.run.use == {"b": 1.0}
