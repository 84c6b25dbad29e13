"""Fused blocks compute what the model's own code computes: losses, gradients, and fifty steps of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import deltaw
from deltaw.core.spec import MethodSpec
from deltaw.data.needed import needed
from deltaw.data.pack import collate
from deltaw.data.template import Example
from deltaw.formats import QUANTISED
from deltaw.methods import spec_from
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from deltaw.ops import arena
from deltaw.ops.native.library import forced, paths
from deltaw.train.loss import sft
from deltaw.train.step import step_gradient
from models import VOCAB, make_net, randomise

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3")
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "alpha": 5},
    "lora-bias": {"method": "lora", "rank": 3, "alpha": 5, "bias": "all"},
    "lora-some": {"method": "lora", "rank": 3, "alpha": 5, "targets": r".*\.1\..*(o|up|qkv)_proj"},
    "lora-head": {"method": "lora", "rank": 3, "alpha": 5, "targets": ("o_proj", "lm_head", "embed_tokens")},
    "lora-norms": {"method": "lora", "rank": 3, "alpha": 5, "save_modules": ("norm", "input_layernorm")},
    "dora": {"method": "dora", "rank": 3, "alpha": 5},
    "vera": {"method": "vera", "rank": 7},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit", "add": True},
}


def rows(seed: int, n: int = 4) -> list[Example]:
    """Documents of which some begin alike, and one ends behind its last target."""
    rng = torch.Generator().manual_seed(seed)
    begin = torch.randint(3, VOCAB, (9,), generator=rng).tolist()
    found = []
    for i in range(n):
        length = 3 + 4 * i
        ids = [*begin[: 1 + i], *torch.randint(3, VOCAB, (length - 1 - i,), generator=rng).tolist()]
        found.append(Example(tuple(ids), tuple(1 + i < t < (14 if i else 3) for t in range(length)), f"row {i}"))
    return found


def test_fused_parity_rows_have_a_front_and_a_tail() -> None:
    batch = collate(rows(1))
    less = needed(batch)
    assert less.fronts is not None
    assert less.n_tokens < batch.n_tokens - 3
    assert int(less.positions.max()) < int(batch.positions.max())


@contextmanager
def plain(model: Model) -> Iterator[None]:
    """The model's own code: a hook that does nothing is enough."""
    hook = model.net.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        assert model.why_plain() == "a module has hooks"
        yield
    finally:
        hook.remove()


def worn(kind: str, spec: MethodSpec, dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
    model = Model(make_net(kind, dtype=dtype, **changes))
    model.attach(spec)
    randomise(model)
    return model


def gradients(model: Model, examples: list[Example], **how: Any) -> tuple[float, dict[str, Tensor]]:
    for t in model.trainable().values():
        t.grad = None
    loss, _, _ = step_gradient(model, examples, sft, **how)
    return loss, {n: t.grad.clone() for n, t in model.trainable().items() if t.grad is not None}


def near(found: Tensor, wanted: Tensor, name: str) -> None:
    """Equal but for the order of sums in float32: relative to the tensor's largest value."""
    apart = float((found - wanted).abs().max() / wanted.abs().max())
    assert apart < 5e-5, f"{name}: {apart}"


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_fused_parity_of_loss_and_gradients(kind: str, method: str) -> None:
    settings = dict(METHODS[method])
    if kind == "phi3" and method in ("lora-some", "ia3"):
        settings["targets"] = ("qkv_proj", "down_proj")
    if kind == "phi3" and method == "ia3":
        settings["feedforward"] = ("down_proj",)
    model = worn(kind, spec_from(settings))
    assert model.why_plain() is None
    loss, grads = gradients(model, rows(1))
    again_loss, again = gradients(model, rows(1), checkpointing=True, micro_tokens=16)
    assert model.arena.kept == 0
    with plain(model):
        own_loss, own = gradients(model, rows(1))
    assert math.isclose(loss, own_loss, rel_tol=1e-6)
    assert math.isclose(loss, again_loss, rel_tol=1e-6)
    assert grads.keys() == own.keys() == again.keys() == model.trainable().keys()
    for name, value in own.items():
        near(grads[name], value, name)
        near(again[name], value, name)


@pytest.mark.parametrize("format", ["float32", "bfloat16", "nf4", "int8"])
@pytest.mark.parametrize("path", paths())
def test_fused_parity_where_rows_lie_apart(monkeypatch, path: str, format: str) -> None:
    """Rows of a multiple of 2 KB, between which the arena leaves a gap: what it leaves them without."""
    dtype = torch.float32 if format == "float32" else torch.bfloat16
    wide = {"hidden_size": 1024, "intermediate_size": 2048, "num_key_value_heads": 2, "head_dim": 256}
    net = make_net("llama", dtype=dtype, **wide)
    if format in QUANTISED:
        quantise_network(net, Format(format, 64, False))
    model = Model(net)
    model.attach(spec_from(METHODS["dora"]))
    randomise(model)
    row = torch.empty(0, dtype=dtype)
    assert not model.arena.borrow(2, 1024, like=row, apart=True).is_contiguous()
    with forced(path):
        loss, grads = gradients(model, rows(1))
        monkeypatch.setattr(arena, "_APART", 1 << 40)
        assert model.arena.borrow(2, 1024, like=row, apart=True).is_contiguous()
        wanted_loss, wanted = gradients(model, rows(1))
    assert loss == pytest.approx(wanted_loss, rel=1e-6 if dtype == torch.float32 else 1e-3)
    for name, value in wanted.items():
        assert (grads[name] - value).norm() < (1e-4 if dtype == torch.float32 else 0.02) * value.norm(), name


def trained(model: Model, steps: int = 50) -> list[float]:
    optimizer = torch.optim.AdamW(list(model.trainable().values()), lr=2e-3)
    losses = []
    for step in range(steps):
        losses.append(gradients(model, rows(step % 5))[0])
        optimizer.step()
    return losses


@pytest.mark.parametrize("kind", FAMILIES)
def test_fused_parity_over_fifty_steps(kind: str) -> None:
    spec = deltaw.Lora(rank=3, alpha=5)
    models = [Model(make_net(kind)) for _ in range(2)]
    for model in models:
        model.attach(spec)
    with plain(models[1]):
        wanted = trained(models[1])
    found = trained(models[0])
    assert found[-5] < found[0] - 0.1
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 1e-5 * found[0]


def test_fused_parity_in_bfloat16_is_within_the_noise_of_two_seeds() -> None:
    spec = deltaw.Lora(rank=3, alpha=5)
    curves = {}
    for name, seed in (("fused", 0), ("plain", 0), ("other seed", 1)):
        model = Model(make_net("llama", dtype=torch.bfloat16))
        model.attach(spec, seed=seed)
        if name == "plain":
            with plain(model):
                curves[name] = trained(model)
        else:
            curves[name] = trained(model)

    def apart(a: str, b: str) -> float:
        return sum(abs(x - y) for x, y in zip(curves[a], curves[b], strict=True)) / len(curves[a])

    assert apart("fused", "plain") < apart("fused", "other seed")


@pytest.mark.parametrize("name", QUANTISED)
def test_fused_parity_on_a_quantised_base(name: str) -> None:
    model = Model(quantise_network(make_net("llama"), Format(name, double_quant=True)))
    model.attach(deltaw.Lora(rank=3, alpha=5))
    randomise(model)
    loss, grads = gradients(model, rows(1))
    with plain(model):
        own_loss, own = gradients(model, rows(1))
    assert math.isclose(loss, own_loss, rel_tol=1e-6)
    for key, value in own.items():
        near(grads[key], value, key)


def test_fused_parity_of_logits_without_an_adapter_and_with_a_finished_one() -> None:
    model, batch = Model(make_net("qwen3")), collate(rows(2))
    for name in ("one", "two"):
        with torch.no_grad():
            found, loss = model.pack_logits(batch), model.pack_loss(batch)
            with plain(model):
                torch.testing.assert_close(found, model.pack_logits(batch), rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(loss, model.pack_loss(batch))
        assert model.arena.kept == 0
        model.attach(deltaw.Lora(rank=3, alpha=5), name)
        randomise(model)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "lora", "dropout": 0.2}, "dropout is above 0"),
        ({"method": "houlsby", "bottleneck": 5}, "houlsby adds a network"),
        ({"method": "houlsby", "bottleneck": 5, "placement": "parallel"}, "houlsby"),
        ({"method": "prefix", "n_tokens": 3}, "prefix stands in front"),
        ({"method": "prompt", "n_tokens": 3}, "prompt stands in front"),
        ({"method": "longlora", "max_positions": 128, "group_least": 4}, "longlora cuts attention"),
        ({"method": "full"}, "the base itself trains"),
        ({"method": "lora", "save_modules": ("up_proj",)}, "is replaced whole"),
    ],
)
def test_fused_parity_plain_path_says_why(settings: dict[str, Any], reason: str) -> None:
    model = Model(make_net("llama"))
    model.attach(spec_from(settings))
    assert reason in (model.why_plain() or "")
    assert math.isfinite(gradients(model, rows(3))[0])


def test_fused_parity_summed_adapters_and_other_architectures_take_the_plain_path() -> None:
    model = Model(make_net("llama"))
    model.attach(deltaw.Lora(rank=3), name="a")
    model.attach(deltaw.Lora(rank=2), name="b")
    assert model.why_plain() is None
    model.use({"a": 1.0, "b": 0.5})
    assert model.why_plain() == "adapters are summed or weighted"
    for kind in ("gpt2", "opt", "phi", "gpt_neox", "gemma2"):
        assert "is not one of Llama" in (Model(make_net(kind)).why_plain() or "")


def test_fused_parity_a_forgotten_forward_gives_its_memory_back() -> None:
    model = worn("llama", deltaw.Lora(rank=3))
    batch = collate(rows(1))
    first, second = model.pack_loss(batch), model.pack_loss(batch)
    assert model.arena.kept > 0
    del first
    second.backward()
    assert model.arena.kept == 0
    whole, half = model.pack_loss(batch), model.pack_loss(batch)
    whole.backward()
    half.backward()  # in the order in which they were made, too
    twice = {n: t.grad.clone() for n, t in model.trainable().items()}
    for n, g in gradients(model, rows(1))[1].items():
        near(twice[n], 3 * g * batch.n_targets, n)


def test_fused_parity_of_threads_that_compute_with_one_model_at_a_time() -> None:
    model = worn("llama", deltaw.Lora(rank=3))
    names, tensors = zip(*model.trainable().items(), strict=True)

    def gradient(seed: int) -> list[Tensor]:
        return list(torch.autograd.grad(model.pack_loss(collate(rows(seed, 6))), tensors))

    wanted = [gradient(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for found, right in zip(pool.map(gradient, range(4)), wanted, strict=True):
                for name, a, b in zip(names, found, right, strict=True):
                    near(a, b, name)
    assert model.arena.kept == 0
