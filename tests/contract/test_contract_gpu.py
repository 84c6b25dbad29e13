"""Every method on a GPU computes what it computes on the CPU: fresh parameters, losses, gradients, answers, files."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from contract_cases import Case, cases
from torch import Tensor

from deltaw.data.template import Example
from deltaw.model.generate import generate
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter
from deltaw.train.loss import sft
from deltaw.train.step import step_gradient
from models import make_net, randomise

pytestmark = pytest.mark.gpu

ROWS = [
    Example(tuple(range(5, 16)), (False,) * 4 + (True,) * 7, "one"),
    Example((7, 9, 11, 2), (False, False, False, True), "two"),
    Example((8, 3, 21, 30, 44, 2), (False, False, True, True, True, True), "three"),
]


@pytest.fixture(params=cases(), ids=str)
def both(request) -> tuple[Model, Model]:
    """The same fresh adapter, with the same noise, on the CPU and on the GPU."""
    case: Case = request.param
    net = make_net(case.kind, **case.changes)
    here, there = Model(net), Model(deepcopy(net).cuda())
    for model in (here, there):
        model.attach(case.spec)
    assert all(t.is_cuda for t in there.adapters["default"].tensors().values())
    ids = torch.tensor([[3, 5, 8, 13], [2, 4, 6, 9]])
    with torch.no_grad():  # not the tensors: factors of an SVD may have other signs
        near(there.logits(ids), here.logits(ids), "fresh")
    randomise(here)
    for mine, its in zip(
        here.adapters["default"].tensors().values(), there.adapters["default"].tensors().values(), strict=True
    ):
        its.data.copy_(mine)
    return here, there


def near(found: Tensor, wanted: Tensor, name: str, room: float = 2e-4) -> None:
    """Equal but for the order of sums in float32: relative to the tensor's largest value."""
    apart = float((found.cpu() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    assert apart < room, f"{name}: {apart}"


def test_loss_and_gradients_are_the_cpus(both):
    here, there = both
    wanted, found = (step_gradient(model, ROWS, sft)[0] for model in both)
    assert found == pytest.approx(wanted, rel=1e-4)
    for (name, mine), its in zip(here.trainable().items(), there.trainable().values(), strict=True):
        near(its.grad, mine.grad, name, 5e-4)


def test_logits_answers_and_files_are_the_cpus(both, tmp_path):
    here, there = both
    ids = torch.tensor([[3, 5, 8, 13], [2, 4, 6, 9]])
    with torch.no_grad():
        near(there.logits(ids), here.logits(ids), "logits")
    prompts = [[3, 5, 8], [9, 4, 6, 11, 30]]
    assert generate(there, prompts, 6) == generate(here, prompts, 6)
    there.adapter().save(tmp_path / "there")
    saved = read_adapter(tmp_path / "there").tensors()
    for name, tensor in here.adapter().tensors().items():
        near(saved[name], tensor, name)
    there.detach()
    there.attach(tmp_path / "there")
    with torch.no_grad():
        near(there.logits(ids), here.logits(ids), "read back")
