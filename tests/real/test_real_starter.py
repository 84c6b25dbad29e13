"""The whole path on the real starter: a few real steps, the peer's logits, the merge, an answer.

The starter is fetched by `make test` before; nothing here touches a network.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import deltaw
from deltaw.core.fingerprint import cache_dir, set_cache_dir
from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import prompt_ids
from deltaw.model.generate import generate
from deltaw.model.load import load_transformers

ROWS = Path(__file__).parents[2] / "data" / "address_json" / "train.jsonl"
NAME = "smollm2-135m-instruct"

pytestmark = pytest.mark.starter


@pytest.fixture(scope="module", autouse=True)
def users_cache() -> Iterator[None]:
    """The cache that `deltaw fetch` fills, whatever other tests have set."""
    before = cache_dir()
    named = os.environ.get("DELTAW_CACHE")
    set_cache_dir(Path(named) if named else None)
    yield
    set_cache_dir(before)


@pytest.fixture(scope="module")
def base() -> Path:
    folder = cache_dir() / "bases" / NAME
    assert folder.is_dir(), "run `deltaw fetch smollm2-135m-instruct` first (make test does)"
    return folder


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six real steps, as a recipe says."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = {
        "base": {"path": NAME},
        "adapter": {"method": "lora", "rank": 6, "alpha": 15, "targets": "all-linear"},
        "data": {"train": str(ROWS)},
        "train": {"steps": 6, "tokens_per_step": 512, "lr": 2e-3, "threads": torch.get_num_threads()},
    }
    events = [e.plain() for e in deltaw.train(recipe, out)]
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert losses[-1] < 0.75 * losses[0], losses
    assert events[-1]["event"] == "done"
    return out


def test_an_adapter_trained_on_the_starter_gives_pefts_logits_and_lets_go_of_the_base(run, base):
    from peft import PeftModel

    model = deltaw.load_base(base)
    ids = torch.tensor([model.tokenizer("A plain sentence about an address in Springfield.")["input_ids"]])
    with torch.no_grad():
        before = model.logits(ids)
        model.attach(run)
        ours = model.logits(ids)
        peers = PeftModel.from_pretrained(load_transformers(base, "float32"), run / "adapter")(ids).logits
        model.detach()
        after = model.logits(ids)
    assert float((ours - before).abs().max()) > 0.5
    # 30 blocks of float32 dot products of up to 1,536 terms, on logits of size 30: both sides round on their own
    torch.testing.assert_close(ours, peers, rtol=0, atol=30 * 1e-5)
    assert torch.equal(after, before)


def test_the_merged_starter_computes_what_the_adapter_does(run, base, tmp_path):
    report = deltaw.bake(base=base, adapter=run, out=tmp_path / "merged", dtype="float32")
    assert report.probe is not None
    assert report.probe.logit_max <= 30 * 1e-5  # as above: logits of size 30
    merged = deltaw.load_base(tmp_path / "merged", dtype="float32")
    attached = deltaw.load_base(base)
    attached.attach(run)
    row = read_rows(ROWS)[3]
    prompt = prompt_ids(row, merged.tokenizer, DataSpec())
    answers = [generate(m, [prompt], 24)[0] for m in (merged, attached)]
    assert answers[0] == answers[1]
    assert merged.tokenizer.decode(answers[0]).strip().startswith("{")


def test_the_saved_adapter_says_where_it_comes_from(run):
    ours = json.loads((run / "adapter" / "deltaw.json").read_text())
    assert ours["fingerprint"]["parameters"] == 134_515_008
    assert ours["provenance"]["recipe"]["adapter"]["rank"] == 6
    assert math.isfinite(ours["provenance"]["metrics"]["train_loss"])
    assert sum(f.stat().st_size for f in (run / "adapter").iterdir()) < 8e6


def test_peft_finds_the_starter_by_the_name_in_the_adapter(run, base):
    from peft import AutoPeftModelForCausalLM

    named = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == base
    found = AutoPeftModelForCausalLM.from_pretrained(run / "adapter")
    assert sum(p.numel() for n, p in found.named_parameters() if "lora_" in n) == 4_884_480 * 6 // 16
