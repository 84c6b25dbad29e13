"""What the traced step keeps is what a real step keeps."""

from __future__ import annotations

import pytest
import torch

from deltaw import Lora
from deltaw.data.template import Example
from deltaw.model.model import Model
from deltaw.plan.heap import Heap
from deltaw.plan.network import Base, planned_model
from deltaw.plan.trace import traced
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
    from deltaw.plan.trace import Tracer

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


def test_a_freed_buffer_has_no_room_for_one_of_its_own_size():
    heap = Heap()
    heap.allocate("large", 30 << 20)  # mapped; freed, it raises the threshold
    heap.free("large")
    for name in "abc":
        heap.allocate(name, 1 << 20)
    before = heap.peak
    heap.free("b")
    heap.allocate("d", 1 << 20)
    assert heap.peak == before  # the mapping's peak was higher
    heap.allocate("e", 28 << 20)
    assert heap.peak > 32 << 20
