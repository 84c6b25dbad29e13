"""Fused blocks on a GPU: the CPU's losses and gradients, in float32; within bfloat16's noise in bfloat16."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from test_fused_parity import FAMILIES, METHODS, gradients, near, plain, rows

from deltaw.formats import QUANTISED
from deltaw.methods import spec_from
from deltaw.model.model import Model
from deltaw.model.quantised import Format, quantise_network
from models import make_net, randomise

pytestmark = pytest.mark.gpu


def twins(kind: str, method: str, dtype: torch.dtype = torch.float32, **changes: object) -> tuple[Model, Model]:
    """One worn model on the CPU and the same on the GPU."""
    net = make_net(kind, dtype=dtype, **changes)
    models = Model(net), Model(deepcopy(net).cuda())
    for model in models:
        model.attach(spec_from(METHODS[method]))
    randomise(models[0])
    for mine, its in zip(models[0].trainable().values(), models[1].trainable().values(), strict=True):
        its.data.copy_(mine)
    return models


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_losses_and_gradients_are_the_cpus(kind, method):
    here, there = twins(kind, method)
    for again in (False, True):
        wanted, of_cpu = gradients(here, rows(1), checkpointing=again)
        found, of_gpu = gradients(there, rows(1), checkpointing=again)
        assert found == pytest.approx(wanted, rel=1e-5)
        for name, grad in of_cpu.items():
            near(of_gpu[name].cpu(), grad, name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_the_models_own_code(kind):
    exact = gradients(twins(kind, "lora")[1], rows(1))
    model = twins(kind, "lora", torch.bfloat16)[1]
    fused = gradients(model, rows(1))
    with plain(model):
        own = gradients(model, rows(1))
    ours, theirs = (
        sum(float((of[1][name] - grad).norm() / grad.norm()) for name, grad in exact[1].items()) for of in (fused, own)
    )
    assert ours < 2.5 * theirs  # so small a model's noise is of this size on the CPU too


@pytest.mark.parametrize("format", QUANTISED)
def test_quantised_bases_compute_as_on_the_cpu(format):
    net = make_net("llama")
    quantise_network(net, Format(format, 64, True))
    here, there = Model(net), Model(deepcopy(net).cuda())
    for model in (here, there):
        model.attach(spec_from(METHODS["lora"]))
    randomise(here)
    for mine, its in zip(here.trainable().values(), there.trainable().values(), strict=True):
        its.data.copy_(mine)
    wanted, of_cpu = gradients(here, rows(1))
    found, of_gpu = gradients(there, rows(1))
    assert found == pytest.approx(wanted, rel=1e-3)
    for name, grad in of_cpu.items():
        assert (of_gpu[name].cpu() - grad).abs().max() < 5e-3 * grad.abs().max(), name
