"""What the traced step keeps is what a real step keeps."""

from __future__ import annotations

import pytest
import torch

from deltaw import Dora, Ia3, Lora
from deltaw.data.template import Example
from deltaw.methods.bitfit import BitFit
from deltaw.methods.full import Full
from deltaw.methods.houlsby import Houlsby
from deltaw.methods.prefix import PrefixTuning
from deltaw.methods.prompt import Prompt
from deltaw.model.model import Model
from deltaw.ops import pool
from deltaw.plan import made
from deltaw.plan.network import Base, planned_model
from deltaw.plan.timeline import Timeline
from deltaw.plan.trace import Tracer, traced
from deltaw.train.loss import sft
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from deltaw.train.step import step_gradient
from models import VOCAB, make_net


def rows(n: int, length: int) -> list[Example]:
    return [Example((3,) * length, (False,) + (True,) * (length - 1), "row") for _ in range(n)]


def saved_by_autograd(model: Model, examples: list[Example]) -> int:
    """Bytes that a real step on real tensors keeps for its backward, without weights: autograd's, and the arena's."""
    known = {t.untyped_storage().data_ptr() for t in (*model.net.parameters(), *model.trainable().values())}
    seen: dict[int, torch.UntypedStorage] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in known:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step_gradient(model, examples, sft)
    region = model.arena._kept._region
    apart = {None if region is None else region.data_ptr()}
    return sum(s.nbytes() for at, s in seen.items() if at not in apart) + model.arena._kept.peak


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_activations_are_what_autograd_keeps_in_a_real_step(kind):
    real = Model(make_net(kind))
    real.attach(Lora(rank=3, alpha=5))
    wanted = saved_by_autograd(real, rows(3, 16))
    net = make_net(kind).to("meta")
    model = Model(net)
    with Tracer(), torch.device("meta"):
        model.attach(Lora(rank=3, alpha=5))
    parameters = list(model.trainable().values())
    known = [*net.parameters(), *net.buffers(), *parameters]
    found = traced(lambda: step_gradient(model, rows(3, 16), sft), known, parameters, VOCAB).peak()
    kept = found["activations"] + found["logits"]
    assert kept == pytest.approx(wanted, rel=0.25)  # masks and rotary tables live too; the real count is a floor
    assert kept > 0.9 * wanted


def test_a_timeline_adds_up_and_ends_with_the_gradients_alone():
    base = Base("gpt2", __import__("deltaw.plan.network", fromlist=["shapes"]).shapes()["gpt2"], None)
    model = planned_model(base, Lora(rank=3, alpha=5))
    parameters = list(model.trainable().values())
    known = [*model.net.parameters(), *model.net.buffers(), *parameters]
    timeline = traced(lambda: step_gradient(model, rows(1, 8), sft), known, parameters, 50257)
    assert sum(size for _, size in timeline.events) == sum(4 * p.numel() for p in parameters)
    assert timeline.held() >= sum(timeline.peak().values())


@pytest.mark.parametrize("adapter", [Lora(rank=3, alpha=5), Dora(rank=2, alpha=3), Ia3()])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("again", [False, True])
def test_plan_trace_knows_an_arena_to_the_byte(kind, adapter, again):
    real = Model(make_net(kind))
    real.attach(adapter)
    examples = rows(3, 16)
    for _ in range(2):
        step_gradient(real, examples, sft, checkpointing=again, seed=1)
    net = make_net(kind).to("meta")
    model = Model(net)
    with Tracer(), torch.device("meta"):
        model.attach(adapter)
    parameters = list(model.trainable().values())
    known = [*net.parameters(), *net.buffers(), *parameters]
    line = traced(
        lambda: step_gradient(model, examples, sft, checkpointing=again, seed=1),
        known,
        parameters,
        VOCAB,
        arena=model.arena,
    )
    assert real.why_plain() is None
    assert line.lent == real.arena._borrowed.peak
    assert line.arena() == real.arena.peak


@pytest.mark.parametrize(
    "adapter",
    [Lora(rank=150, alpha=5), Lora(rank=3, dropout=0.1), Dora(rank=2), Ia3(), Full(), BitFit(), Prompt()],
    ids=str,
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("again", [False, True])
def test_plan_trace_of_the_second_micro_batch_alone_is_that_of_two(kind, adapter, again):
    examples = rows(3, 16)
    found = []
    for how in ({"twice": True}, {}):
        net = make_net(kind).to("meta")
        model = Model(net)
        with Tracer(), torch.device("meta"):
            model.attach(adapter)
        idle = torch.empty(1 << 20, device="meta", requires_grad=True)  # gets no gradient
        parameters = [*model.trainable().values(), idle]

        def work() -> None:
            for _ in range(1 if how else 2):  # noqa: B023
                step_gradient(model, examples, sft, checkpointing=again, seed=1)  # noqa: B023

        line = traced(
            work, [*net.parameters(), *net.buffers(), *parameters], parameters, VOCAB, arena=model.arena, **how
        )
        gradients = [s for n, s in line.events.tolist() if s > 0 and line.named[n] == "gradients"]
        found.append((line.peak(), line.arena(), line.held(), line.lent, sorted(gradients)))
    assert found[0] == found[1]


def plan(base: str = "smollm2-135m", n: int = 4, length: int = 64, **train):
    recipe = load_recipe({"base": {"path": base, "dtype": "bfloat16"}, "adapter": {"method": "lora"}, "train": train})
    return Planner(recipe, Work.of_rows(n, length)).plan()


def test_checkpointing_and_micro_batches_need_less():
    whole, again, small = plan(), plan(checkpointing=True), plan(micro_tokens=64)
    at = [p.moments["step"]["activations"] for p in (whole, again, small)]
    assert at[1] < at[0] / 5
    factors = 2 * 4_884_480  # A and B in bfloat16, kept for the backward whatever the tokens
    assert at[2] - factors == pytest.approx((at[0] - factors) / 4, rel=0.02)
    assert again.peak_bytes < whole.peak_bytes


def test_causes_add_up_to_the_peak():
    plain = plan().plain()
    assert sum(plain["bytes"].values()) == plain["peak_bytes"]
    assert plain["growth_bytes"] == plain["step_peak_bytes"] - plain["after_load_bytes"]
    assert all(isinstance(v, int) for v in plain["bytes"].values())


def test_a_mask_of_dropout_is_counted_and_not_drawn():
    rows_of, width = 3, 1 << 40  # a real one would not fit anywhere

    def work() -> None:
        keep = torch.rand(rows_of, width, generator=torch.Generator().manual_seed(1)) >= 0.5
        keep.to(torch.float16)

    timeline = traced(work, [], [], 7)
    n = rows_of * width
    assert [size for _, size in timeline.events if size > 0] == [4 * n, n, 2 * n]


def test_gradients_that_are_handed_on_come_by_size_within_a_part():
    cause = ["workspace", "workspace", "workspace", "gradients", "gradients", "gradients"]
    copies = [[(3, 5), (0, -5)], [(4, 2), (1, -2)], [(5, 5), (2, -5)]]
    made = [(0, 5), (1, 2), (2, 5)]
    line = Timeline.of(made + [e for pair in copies for e in pair], cause)
    assert line.settled().events.tolist() == [
        list(e) for e in (*made, (3, 2), (1, -2), (4, 5), (0, -5), (5, 5), (2, -5))
    ]
    apart = Timeline(line.events, line.cause, [(5, 5, 1)])
    assert apart.settled() is apart


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [
        ("gpt2", Lora(rank=3, alpha=5)),
        ("opt", Lora(rank=3, alpha=5)),
        ("gpt_neox", Dora(rank=2, alpha=3)),
        ("llama", PrefixTuning(n_tokens=5)),
        ("llama", Prompt(n_tokens=5)),
        ("llama", Houlsby(bottleneck=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.method,
)
def test_plan_trace_a_pool_holds_what_is_planned(kind, adapter, again):
    assert pool.start()
    examples = rows(60, 40)

    def work(model: Model) -> None:
        step_gradient(model, examples, sft, checkpointing=again, seed=1)

    real = Model(make_net(kind))
    real.attach(adapter)
    work(real)  # what a first step makes and keeps
    for p in real.trainable().values():
        p.grad = None
    pool.settle()
    before = pool.pooled().in_use
    work(real)
    held = pool.pooled().most - before
    model = Model(make_net(kind).to("meta"))
    with Tracer(), torch.device("meta"):
        model.attach(adapter)
    parameters = list(model.trainable().values())
    known = [*model.net.parameters(), *model.net.buffers(), *parameters]
    line = traced(lambda: work(model), known, parameters, VOCAB, arena=model.arena)
    assert held > 3_000_000
    assert 0 <= line.held() - held < 0.1 * held  # buffers of less than 64 KB are planned too, and lie elsewhere


def test_a_gradient_that_is_not_asked_for_is_remembered_as_none(monkeypatch):
    backward = torch.ops.aten.native_layer_norm_backward.default
    x, w = torch.empty(6, 8, device="meta"), torch.empty(8, device="meta")
    mean = torch.empty(6, 1, device="meta")
    args = (x, x, [8], mean, mean, w, w, [True, False, False])
    monkeypatch.setattr(made, "_MADE", {})
    first = made.made(backward, args, {}, ())
    assert len(made._MADE) == 1
    again = made.made(backward, args, {}, ())
    for found in (first, again):
        assert (found[0].shape, found[0].stride(), found[0].dtype) == (x.shape, x.stride(), x.dtype)
        assert found[1:] == (None, None)
    assert again[0] is not first[0]
