"""Combining and compressing on the real starter: a sum of adapters is what the set in use computes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.core.fingerprint import cache_dir, set_cache_dir
from models import randomise

pytestmark = pytest.mark.starter


@pytest.fixture(scope="module")
def starter() -> Iterator[deltaw.Model]:
    """The starter from the cache that `deltaw fetch` fills."""
    before = cache_dir()
    named = os.environ.get("DELTAW_CACHE")
    set_cache_dir(Path(named) if named else None)
    yield deltaw.load_base("smollm2-135m-instruct")
    set_cache_dir(before)


def test_a_sum_and_its_compression_compute_what_the_set_in_use_does(starter, tmp_path):
    ids = torch.tensor([starter.tokenizer("A plain sentence about an address in Springfield.")["input_ids"]])
    specs = {
        "one": deltaw.Lora(rank=3, alpha=5, targets=("q_proj", "down_proj")),
        "two": deltaw.Lora(rank=6, alpha=2, rslora=True, targets=("q_proj", "v_proj")),
    }
    made = {}
    for seed, (name, spec) in enumerate(specs.items()):
        starter.attach(spec, name=name)
        randomise(starter, name, seed=seed, size=0.03)
        made[name] = starter.adapter(name)
    with torch.no_grad():
        starter.use(None)
        base = starter.logits(ids)
        starter.use({"one": 0.8, "two": -0.3})
        wanted = starter.logits(ids)
        starter.detach()
        deltaw.combine(list(made.values()), [0.8, -0.3], out=tmp_path / "sum")
        deltaw.compress(tmp_path / "sum", tmp_path / "small", error=1e-3)
        for folder, atol in (("sum", 30 * 1e-5), ("small", 0.05)):  # 30 blocks, on logits of size 30
            starter.attach(tmp_path / folder)
            torch.testing.assert_close(starter.logits(ids), wanted, rtol=0, atol=atol)
            starter.detach()
    assert float((wanted - base).abs().max()) > 0.5
