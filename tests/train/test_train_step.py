"""A step's gradient against a slow reference, and what steps change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import ROWS, VALID, plain_transformers, recipe, run
from torch import Tensor

from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import Example, encode_all
from deltaw.errors import WorkFailed
from deltaw.methods import Full, Lora
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.train.loop import Loop
from deltaw.train.loss import sft
from deltaw.train.recipe import load_recipe
from deltaw.train.step import mean_loss, step_gradient


def worn(base: Path, **settings: object) -> Model:
    """The base with a LoRA whose B is not zero, so that A has a gradient too."""
    model = load_base(base)
    model.attach(Lora(**{"rank": 3, "alpha": 5, **settings}))
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.trainable().values():
            tensor += 0.1 * torch.randn(tensor.shape, generator=rng)
    return model


def examples_of(model: Model, rows: list[dict] = ROWS) -> list[Example]:
    return encode_all(read_rows(rows), model.tokenizer, DataSpec()).examples


def gradient(model: Model, examples: list[Example], **options: object) -> tuple[float, dict[str, Tensor]]:
    for tensor in model.trainable().values():
        tensor.grad = None
    loss, tokens, targets = step_gradient(model, examples, sft, **options)
    assert tokens == sum(len(e.input_ids) for e in examples)
    assert targets == sum(e.n_targets for e in examples)
    return loss, {name: t.grad.clone() for name, t in model.trainable().items()}


def assert_near(found: dict[str, Tensor], wanted: dict[str, Tensor], what: str) -> None:
    """Sums of some hundred float32 terms in another order: 1e-5 of the largest term is ample and shows errors."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        atol = 1e-5 * float(value.abs().max())
        assert atol > 0, f"{name} has no gradient to compare"
        torch.testing.assert_close(found[name], value, rtol=0, atol=atol, msg=lambda m, n=name: f"{what} {n}: {m}")


def naive_loss(net: torch.nn.Module, examples: list[Example]) -> Tensor:
    """Mean over all target tokens, one row at a time, unpacked, by transformers and torch alone."""
    total: Tensor = torch.zeros(())
    for example in examples:
        ids = torch.tensor([example.input_ids])
        logits = net(input_ids=ids, use_cache=False).logits[0].float()
        at = torch.tensor(example.is_target).nonzero().flatten()
        total = total + F.cross_entropy(logits[at - 1], ids[0, at], reduction="sum")
    return total / sum(e.n_targets for e in examples)


def test_the_loss_and_gradient_are_those_of_the_plain_mean_over_all_targets(base: Path) -> None:
    model = worn(base)
    examples = examples_of(model)
    loss, found = gradient(model, examples)
    net = plain_transformers(base, dtype=torch.float32)
    scale = 5 / 3
    params = {k: v.detach() for k, v in model.trainable().items()}
    sites = {name.rpartition(":")[0] for name in params}
    with torch.no_grad():
        for site in sites:
            net.get_submodule(site).weight += scale * params[f"{site}:B"] @ params[f"{site}:A"]
    mean = naive_loss(net, examples)
    mean.backward()
    wanted = {}
    for site in sites:
        G = net.get_submodule(site).weight.grad  # W' = W + s B A: dB = s G A^T, dA = s B^T G
        wanted[f"{site}:B"] = scale * G @ params[f"{site}:A"].T
        wanted[f"{site}:A"] = scale * params[f"{site}:B"].T @ G
    assert len(sites) == 14
    assert loss == pytest.approx(float(mean.detach()), rel=1e-6)
    assert_near(found, {name: wanted[name] for name in found}, "against plain transformers,")


def test_full_fine_tuning_has_the_gradient_of_plain_transformers(base: Path) -> None:
    model = load_base(base)
    model.attach(Full())
    examples = examples_of(model)
    loss, found = gradient(model, examples, micro_tokens=30)
    net = plain_transformers(base, dtype=torch.float32)
    mean = naive_loss(net, examples)
    mean.backward()
    assert loss == pytest.approx(float(mean.detach()), rel=1e-6)
    assert_near(found, {n: p.grad for n, p in net.named_parameters()}, "full,")


def test_the_mean_is_over_tokens_not_over_rows_or_micro_batches(base: Path) -> None:
    model = worn(base)
    long = {"prompt": "a", "completion": "a rather long answer, of many tokens"}
    examples = examples_of(model, [long, *ROWS[:3]])
    sums = [gradient(model, [e])[0] * e.n_targets for e in examples]
    loss, _ = gradient(model, examples, micro_tokens=1)
    assert loss == pytest.approx(sum(sums) / sum(e.n_targets for e in examples), rel=1e-6)
    by_rows = sum(s / e.n_targets for s, e in zip(sums, examples, strict=True)) / len(examples)
    assert abs(loss - by_rows) > 1e-3


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3}, {"dropout": 0.3, "targets": ("q_proj", "lm_head")}])
@pytest.mark.parametrize("micro_tokens", [1, 17, 25, 64])
def test_a_step_s_gradient_does_not_depend_on_how_it_is_split(base: Path, micro_tokens: int, settings: dict) -> None:
    model = worn(base, **settings)
    examples = examples_of(model)
    loss, whole = gradient(model, examples)
    split_loss, split = gradient(model, examples, micro_tokens=micro_tokens)
    assert split_loss == pytest.approx(loss, rel=1e-6)
    assert_near(split, whole, f"micro_tokens={micro_tokens},")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("micro_tokens", [None, 25])
def test_checkpointing_gives_the_same_gradient_bit_for_bit(
    base: Path, dropout: float, micro_tokens: int | None
) -> None:
    model = worn(base, dropout=dropout)
    examples = examples_of(model)
    kept = gradient(model, examples, seed=7, micro_tokens=micro_tokens)
    again = gradient(model, examples, seed=7, micro_tokens=micro_tokens, checkpointing=True)
    assert again[0] == kept[0]
    for name, value in kept[1].items():
        assert torch.equal(again[1][name], value), name
    assert not any("forward" in vars(m) for m in model.net.modules()), "blocks must be as they were"


def test_dropout_is_a_function_of_the_step_s_seed_and_off_outside_training(base: Path) -> None:
    model, still = worn(base, dropout=0.5), worn(base, dropout=0.0)
    examples = examples_of(model)
    one, two = gradient(model, examples, seed=1), gradient(model, examples, seed=2)
    assert gradient(model, examples, seed=1)[0] == one[0]
    assert one[0] != two[0]
    assert one[0] != gradient(still, examples)[0]
    assert mean_loss(model, examples, sft) == mean_loss(still, examples, sft)
    assert model.run.seed is None


@pytest.mark.parametrize("seed", [123_456_789, 2**40, -1])
def test_any_seed_is_good_for_dropout(base: Path, tmp_path: Path, seed: int) -> None:
    plain = recipe(base, adapter={"dropout": 0.2}, train={"steps": 2, "seed": seed})
    assert run(plain, tmp_path / "run")[-1].steps == 2


def test_mean_loss_is_the_plain_mean_whatever_is_computed_at_a_time(base: Path) -> None:
    model = load_base(base)
    examples = examples_of(model)
    with torch.no_grad():
        wanted = float(naive_loss(plain_transformers(base, dtype=torch.float32), examples))
    for tokens in (1, 30, 4096):
        assert mean_loss(model, examples, sft, tokens) == pytest.approx(wanted, rel=1e-6)


# A loop's updates -----------------------------------------------------------------------------------


def loop_of(base: Path, model: Model | None = None, **sections: dict) -> Loop:
    loaded = load_recipe(recipe(base, **sections))
    if model is None:
        model = load_base(base)
        model.attach(loaded.adapter)
    return Loop(model, examples_of(model), loaded, None)


def test_training_changes_the_adapter_alone_and_detach_gives_the_base_back(base: Path) -> None:
    model = load_base(base)
    ids = torch.tensor([[5, 9, 200, 31, 7, 80]])
    with torch.no_grad():
        before = model.logits(ids)
    weights = {n: t.clone() for n, t in model.net.state_dict().items()}
    model.attach(Lora(rank=3, alpha=5))
    loop = loop_of(base, model)
    started = {n: t.detach().clone() for n, t in loop.parameters.items()}
    list(loop.run())
    for name, tensor in loop.parameters.items():
        assert not torch.equal(tensor, started[name]), f"{name} did not train"
    with torch.no_grad():
        assert not torch.equal(model.logits(ids), before)
        model.detach()
        assert torch.equal(model.logits(ids), before)
    after = model.net.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[n], t) for n, t in weights.items())
    assert all(p.grad is None and not p.requires_grad for p in model.net.parameters())


def test_four_rows_are_learned_by_heart(base: Path, tmp_path: Path) -> None:
    plain = recipe(base, adapter={"rank": 8, "alpha": 16}, train={"steps": 60, "lr": 0.01})
    events = run(plain, tmp_path / "run", rows=ROWS[:4])
    assert events[1].loss > 5
    assert events[-1].loss < 0.1


def test_lora_plus_moves_b_by_its_ratio_and_a_as_before(base: Path) -> None:
    moved = {}
    for ratio in (1.0, 16.0):
        loop = loop_of(base, train={"optimizer": {"lora_plus_ratio": ratio}, "lr": 1e-3, "warmup_ratio": 0})
        with torch.no_grad():
            for name, tensor in loop.parameters.items():
                if name.endswith(":B"):
                    tensor.fill_(0.125)  # at zero, A would have no gradient
        before = {n: t.detach().clone() for n, t in loop.parameters.items()}
        next(iter(loop.run()))
        moved[ratio] = {n: t.detach() - before[n] for n, t in loop.parameters.items()}
    for name, by_one in moved[1.0].items():
        ratio = 16.0 if name.endswith(":B") else 1.0
        # an update of 1e-3 on a value of 0.1 to 0.5 is known to float32's spacing there, 2^-25
        torch.testing.assert_close(moved[16.0][name], ratio * by_one, rtol=0, atol=18 * 2**-25)
        assert float(by_one.abs().max()) > 5e-4


def test_clipping_bounds_the_norm_of_the_whole_gradient(base: Path) -> None:
    loop = loop_of(base)
    examples = [loop.examples[i] for i in loop.schedule.rows(0)]
    _, raw = gradient(loop.model, examples)
    norm = float(torch.cat([g.flatten() for g in raw.values()]).norm())
    for limit in (norm / 2, norm * 2, 0.0):
        for name, tensor in loop.parameters.items():
            tensor.grad = raw[name].clone()
        assert float(loop._clip(limit)) == pytest.approx(norm, rel=1e-5)
        factor = 0.5 if 0 < limit < norm else 1.0
        for name, tensor in loop.parameters.items():
            torch.testing.assert_close(tensor.grad, factor * raw[name], rtol=1e-5, atol=1e-9)


def test_a_step_tells_its_loss_rate_norm_and_counts(base: Path) -> None:
    loop = loop_of(base, train={"clip": 0.01})
    rows = loop.schedule.rows(0)
    examples = [loop.examples[i] for i in rows]
    loss, raw = gradient(loop.model, examples)
    loop.optimizer.zero_grad()
    step = next(iter(loop.run()))
    norm = float(torch.cat([g.flatten() for g in raw.values()]).norm())
    assert (step.step, step.loss) == (1, loss)
    assert step.grad_norm == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    assert step.tokens == sum(len(e.input_ids) for e in examples)
    assert step.target_tokens == sum(e.n_targets for e in examples)
    assert all(t.grad is None for t in loop.parameters.values())


def test_adamw_s_first_step_is_the_one_written_by_hand(base: Path) -> None:
    settings = {"weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6}
    loop = loop_of(base, train={"optimizer": settings, "lr": 0.01, "warmup_ratio": 0, "clip": 0})
    _, raw = gradient(loop.model, [loop.examples[i] for i in loop.schedule.rows(0)])
    loop.optimizer.zero_grad()
    before = {n: t.detach().clone() for n, t in loop.parameters.items()}
    next(iter(loop.run()))
    for name, tensor in loop.parameters.items():
        # after one step both bias-corrected moments are the gradient and its square
        wanted = before[name] * (1 - 0.01 * 0.1) - 0.01 * raw[name] / (raw[name].abs() + 1e-6)
        torch.testing.assert_close(tensor.detach(), wanted, rtol=1e-5, atol=1e-7)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_rows(base: Path) -> None:
    loop = loop_of(base)
    steps = iter(loop.run())
    next(steps)
    name, poisoned = next(iter(loop.parameters.items()))
    with torch.no_grad():
        poisoned[0, 0] = float("nan")
    before = {n: t.detach().clone() for n, t in loop.parameters.items()}
    with pytest.raises(WorkFailed, match="Step 2: loss is nan") as caught:
        next(steps)
    where = loop.examples[loop.schedule.rows(1)[0]].where
    assert where in str(caught.value)
    assert "train.lr" in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in loop.parameters.items() if n != name)


@pytest.mark.parametrize("valid", [None, VALID])
def test_a_last_step_that_breaks_the_adapter_is_no_result(base: Path, tmp_path: Path, valid: list | None) -> None:
    out = tmp_path / "run"
    said = "left NaN or Inf in" if valid is None else "the loss on the validation rows is nan after it"
    with pytest.raises(WorkFailed, match=said):
        run(recipe(base, train={"steps": 1, "lr": 1e39}), out, valid=valid)
    assert not (out / "done.json").exists()
    assert not (out / "adapter").exists()


def test_training_in_bfloat16_keeps_float32_parameters_and_learns(base: Path, tmp_path: Path) -> None:
    plain = recipe(base, base={"dtype": "bfloat16"}, train={"steps": 30})
    events = run(plain, tmp_path / "run", rows=ROWS[:4], valid=VALID)
    assert events[0].dtype == "bfloat16"
    assert events[-1].loss < events[1].loss / 2
    from tiny_runs import adapter_tensors

    assert {t.dtype for t in adapter_tensors(tmp_path / "run" / "adapter").values()} == {torch.float32}
