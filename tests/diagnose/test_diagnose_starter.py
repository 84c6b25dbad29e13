"""The starter on shipped data: two short runs made to fail and one that goes well."""

from __future__ import annotations

from pathlib import Path

import pytest

import deltaw
from deltaw.core.fingerprint import set_cache_dir
from deltaw.data import read_rows

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.mark.slow
@pytest.mark.starter
@pytest.mark.parametrize(
    ("data", "adapter", "wanted"),
    [
        ("address_json", {"rank": 1, "alpha": 2, "targets": ["q_proj"]}, ["rank_too_low"]),
        ("supersense", {"rank": 8, "alpha": 800}, ["alpha_misconfigured"]),
        ("address_json", {"rank": 16, "alpha": 32}, []),
    ],
)
def test_diagnose_starter_runs_on_real_rows(tmp_path, cache, data, adapter, wanted):
    recipe = {
        "base": "smollm2-135m-instruct",
        "adapter": {"method": "lora", **adapter},
        "data": {"max_tokens": 256},
        "train": {"steps": 40, "tokens_per_step": 512, "lr": 1e-3, "save_every_s": 1e6},
        "eval": {"keep": "last"},
    }
    mine = [{"prompt": r.prompt, "completion": r.completion} for r in read_rows(DATA / data / "train.jsonl")]
    set_cache_dir(None)  # the starter lies in the user's
    try:
        list(deltaw.train(recipe, tmp_path / "run", train_rows=mine))
        found = deltaw.diagnose(tmp_path / "run")
    finally:
        set_cache_dir(cache)
    assert [f.kind for f in found.findings] == wanted
    assert 0 < found.rounded["bfloat16"].error < 0.5
