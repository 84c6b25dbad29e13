"""Tiny runs made to fail, each in one way, and tiny runs that went well: trained here, diagnosed from their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diagnosed_runs import rows, run, save_base
from safetensors.torch import load_file, save_file

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.diagnose.sites import measure_alone
from deltaw.errors import AdapterError, BadInput, BaseError, DataError, NotFound, WorkFailed
from deltaw.model.base import load_base
from models import randomise

LEARNED = rows(48, 6)


def lora(rank: int, alpha: float, **more):
    return {"method": "lora", "rank": rank, "alpha": alpha, **more}


def kinds(*args, **options) -> list[str]:
    return [f.kind for f in deltaw.diagnose(*args, **options).findings]


# Five ways to fail -----------------------------------------------------------------------------------


def test_diagnose_runs_finds_a_rank_that_is_too_low_and_a_trial_proves_it(base, tmp_path):
    data = rows(256, 64)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in data))
    places = ["v_proj", "down_proj"]
    low = run(base, tmp_path / "low", data=data, adapter=lora(1, 2, targets=places), steps=120)
    found = deltaw.diagnose(low)
    assert [f.kind for f in found.findings] == ["rank_too_low"]
    assert "rank 1" in found.findings[0].message
    assert "rank 4" in found.findings[0].remedy
    tried = deltaw.diagnose(low, data=path, rank=8)
    assert [f.kind for f in tried.findings] == ["rank_too_low"]
    assert tried.trial.gain > 10 * tried.trial.noise
    assert f"reach a loss of {tried.trial.reached:.3g} with rank 8" in tried.findings[0].message
    high = run(base, tmp_path / "high", data=data, adapter=lora(8, 16, targets=places), steps=120)
    again = deltaw.diagnose(high)
    assert again.findings == []
    assert again.curve.final == pytest.approx(tried.trial.reached, rel=1e-4)  # the trial is that very run
    with pytest.raises(DataError, match="hash differs"):
        deltaw.diagnose(low, data=_rows_file(tmp_path, data[:-1]), rank=8)


def _rows_file(folder: Path, data: list[dict[str, str]]) -> Path:
    (folder / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in data))
    return folder / "other.jsonl"


@pytest.mark.parametrize(("alpha", "word"), [(900, "too large"), (0.005, "too small")])
def test_diagnose_runs_finds_an_alpha_far_off(base, tmp_path, alpha, word):
    found = deltaw.diagnose(run(base, tmp_path / "run", data=LEARNED, adapter=lora(6, alpha)))
    assert found.findings[0].kind == "alpha_misconfigured"
    assert word in found.findings[0].title
    assert f"alpha is {alpha:g} at rank 6" in found.findings[0].message
    assert "Set alpha to about 12" in found.findings[0].remedy
    assert not [f for f in found.findings if f.kind not in ("alpha_misconfigured", "merge_precision")]


def test_diagnose_runs_finds_a_learning_rate_far_off(base, tmp_path):
    high = deltaw.diagnose(run(base, tmp_path / "high", data=LEARNED, lr=0.3))
    assert high.findings[0].title == "The update is too large: alpha or learning rate too high"
    assert "Lower the learning rate" in high.findings[0].remedy
    low = deltaw.diagnose(run(base, tmp_path / "low", data=LEARNED, lr=1e-5))
    assert low.findings[0].title == "The update is too small: alpha or learning rate too low"
    assert "Raise the learning rate" in low.findings[0].remedy


def test_diagnose_runs_finds_another_base_of_the_same_shapes(healthy, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    found = deltaw.diagnose(healthy, other)
    assert [f.kind for f in found.findings] == ["base_mismatch"]
    assert "weights" in found.findings[0].message
    assert all(r.weight_norm is None for r in found.rows)  # norms of another base say nothing
    assert any(n["check"] == "norms of the weights and merging" for n in found.not_made)


def test_diagnose_runs_finds_another_base_of_other_shapes(healthy, tmp_path):
    found = deltaw.diagnose(healthy / "adapter", save_base(tmp_path / "gpt2", kind="gpt2"))
    assert "base_mismatch" in [f.kind for f in found.findings]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (foreign / name).write_bytes((healthy / "adapter" / name).read_bytes())
    unsaid = deltaw.diagnose(foreign, tmp_path / "gpt2")
    assert [f.kind for f in unsaid.findings] == ["base_mismatch"]
    assert "no such place" in unsaid.findings[0].message
    assert any(n["check"] == "identity of the base" for n in unsaid.not_made)


@pytest.mark.filterwarnings("ignore:The base differs")  # nf4 in training, dense in the merge
def test_diagnose_runs_finds_a_merge_that_swallowed_the_update(base, tmp_path):
    small = run(base, tmp_path / "small", data=LEARNED, lr=6e-4, format="nf4")
    assert kinds(small) == []
    deltaw.bake(base, small, tmp_path / "in4", into="quantised")
    found = deltaw.diagnose(small, merged=tmp_path / "in4")
    assert [f.kind for f in found.findings] == ["merge_precision"]
    assert "as it was merged" in found.findings[0].message
    deltaw.bake(base, small, tmp_path / "in32", measure=False)
    assert deltaw.diagnose(small, merged=tmp_path / "in32").rounded["written"].error < 1e-6
    assert kinds(small, merge_dtype="nf4") == ["merge_precision"]


def test_diagnose_runs_finds_bfloat16_that_swallows(tmp_path):
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    found = deltaw.diagnose(run(base, tmp_path / "run", data=LEARNED, lr=1e-5))
    assert "merge_precision" in [f.kind for f in found.findings]
    assert found.rounded["bfloat16"].lost > 0.6
    deltaw.bake(base, tmp_path / "run", tmp_path / "merged", measure=False)  # in the base's bfloat16
    written = deltaw.diagnose(tmp_path / "run", merged=tmp_path / "merged").rounded
    assert written["written"].error == pytest.approx(written["bfloat16"].error, rel=1e-6)


def test_diagnose_runs_finds_forgetting(base, tmp_path):
    general = [{"text": r["prompt"] + " " + r["completion"]} for r in rows(60, 6, seed=4)]
    able = run(base, tmp_path / "able", data=general, adapter={"method": "full"}, steps=150, lr=3e-3) / "model"
    text = _rows_file(tmp_path, general)
    choices = sorted({r["completion"] for r in rows(60, 6, seed=4)})
    questions = tmp_path / "questions.jsonl"
    asked = [{**r, "choices": choices} for r in rows(60, 6, seed=4)]
    questions.write_text("".join(json.dumps(r) + "\n" for r in asked))
    narrow = run(able, tmp_path / "narrow", data=rows(12, 1, seed=9), lr=0.02)
    found = deltaw.diagnose(narrow, check_forgetting=True, general=questions, text=text)
    assert [f.kind for f in found.findings] == ["forgetting"]
    assert found.forgetting.n == 60
    assert found.forgetting.right_before > 40 > found.forgetting.right_after
    assert found.forgetting.perplexity_after > 2 * found.forgetting.perplexity_before
    assert "perplexity on general text" in found.findings[0].message
    gentle = run(able, tmp_path / "gentle", data=rows(60, 6, seed=4), lr=1e-3)
    assert "forgetting" not in kinds(gentle, check_forgetting=True, general=questions, text=text)


# Healthy ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "kind", "settings"),
    [
        (lora(6, 9), "llama", {}),
        (lora(16, 16, rslora=True), "qwen2", {"lr": 0.005}),
        ({"method": "dora", "rank": 6, "alpha": 9}, "llama", {}),
        (lora(8, 16), "gpt2", {"steps": 100, "schedule": "constant"}),
        ({"method": "bitfit"}, "llama", {"lr": 0.03}),
        ({"method": "ia3"}, "llama", {"lr": 0.1}),
        ({"method": "houlsby", "bottleneck": 8}, "llama", {}),
    ],
)
def test_diagnose_runs_is_silent_on_healthy_ones(tmp_path, adapter, kind, settings):
    base = save_base(tmp_path / "base", kind=kind)
    found = deltaw.diagnose(run(base, tmp_path / "run", data=LEARNED, valid=LEARNED[:8], adapter=adapter, **settings))
    assert found.findings == []
    assert found.curve.has_fallen
    assert json.loads(json.dumps(found.as_dict()))["method"] == adapter["method"]


def test_diagnose_runs_measures_what_dense_arithmetic_gives(healthy, base):
    found = deltaw.diagnose(healthy)
    adapter = deltaw.load_adapter(healthy)
    weights = load_file(base / "model.safetensors")
    assert len(found.rows) == 14
    for r in found.rows:
        A, B = (adapter.sites[r.name][p].double() for p in "AB")
        w = weights[f"{r.name}.weight"].double()
        dense = 1.5 * B @ A
        assert r.spectrum.values == pytest.approx(torch.linalg.svdvals(dense)[:6].tolist(), rel=1e-6)
        assert r.ratio == pytest.approx(float(dense.norm() / w.norm()), rel=1e-6)
        assert r.reach == pytest.approx(1.5 * float(A.norm()) / float(w.norm() / math.sqrt(w.shape[0])), rel=1e-6)
        assert (r.rank, r.scale, r.shape) == (6, 1.5, tuple(w.shape))
    assert found.rate == 0.01


def test_diagnose_runs_measures_gains_against_the_base(base, tmp_path):
    made = run(base, tmp_path / "dora", data=LEARNED, adapter={"method": "dora", "rank": 6, "alpha": 9})
    merged = tmp_path / "merged"
    deltaw.bake(base, made, merged, measure=False)
    before, after = (load_file(p / "model.safetensors") for p in (base, merged))
    for r in deltaw.diagnose(made).rows:
        d = (after[f"{r.name}.weight"] - before[f"{r.name}.weight"]).double()
        assert r.update_norm == pytest.approx(float(d.norm()), rel=1e-5)
        assert r.spectrum.given == min(d.shape)
    rows_alone, others = measure_alone(deltaw.load_adapter(made))
    assert (len(rows_alone), len(others)) == (0, 14)


# Adapters alone, and what is broken ---------------------------------------------------------------------


def _edited(run_folder: Path, out: Path, edit) -> Path:
    """The run's adapter as a foreign file with its tensors edited."""
    out.mkdir()
    tensors = {
        k: edit(k, v.clone()) for k, v in load_file(run_folder / "adapter" / "adapter_model.safetensors").items()
    }
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_bytes((run_folder / "adapter" / "adapter_config.json").read_bytes())
    return out


def test_diagnose_runs_finds_adapters_that_do_nothing(healthy, base, tmp_path):
    zero = _edited(healthy, tmp_path / "zero", lambda k, v: v * 0 if "lora_B" in k else v)
    assert kinds(zero) == ["no_update"]
    assert kinds(zero, base) == ["no_update"]
    some = _edited(healthy, tmp_path / "some", lambda k, v: v * 0 if "1.mlp.up_proj.lora_B" in k else v)
    (found,) = deltaw.diagnose(some, base).findings
    assert (found.kind, found.where) == ("dead_places", ("model.layers.1.mlp.up_proj",))
    data = _rows_file(tmp_path, LEARNED)
    assert kinds(zero, base, data=data) == ["no_update", "no_help"]
    assert kinds(healthy, data=data) == []


def test_diagnose_runs_finds_nan(healthy, base, tmp_path):
    nan = _edited(healthy, tmp_path / "nan", lambda k, v: v * math.nan if "0.mlp.up_proj.lora_A" in k else v)
    (found,) = deltaw.diagnose(nan, base).findings
    assert found.kind == "not_finite"
    assert found.where == ("model.layers.0.mlp.up_proj:A",)


def test_diagnose_runs_says_what_it_could_not_check(healthy, base, tmp_path):
    alone = tmp_path / "alone"
    model = load_base(base)
    model.attach(deltaw.Lora(rank=3, alpha=5))
    randomise(model)
    model.adapter().save(alone)
    found = deltaw.diagnose(alone)
    why = {n["check"]: n["why"] for n in found.not_made}
    assert {"loss curve", "steps against weights", "forgetting", "norms of the weights, base and merging"} <= set(why)
    assert isinstance(deltaw.load_adapter(alone), Adapter)
    inside = deltaw.diagnose(healthy / "adapter")  # the run around it is found
    assert inside.curve is not None
    assert inside.base == str(base)


def test_diagnose_runs_reads_an_unfinished_run_without_an_adapter(healthy, tmp_path):
    for name in ("run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((healthy / name).read_bytes())
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:30]))
    found = deltaw.diagnose(tmp_path)
    why = {n["check"]: n["why"] for n in found.not_made}
    assert "step " in why["the rest of the run"]
    assert "no adapter" in why["spectrum, norms and merging"]
    assert (found.adapter, found.method, found.rows) == (None, "lora", [])


def test_diagnose_runs_refuses_what_it_cannot_use(healthy, base, tmp_path):
    with pytest.raises(NotFound, match="no such folder"):
        deltaw.diagnose(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds no adapter"):
        deltaw.diagnose(tmp_path / "empty")
    with pytest.raises(BaseError):
        deltaw.diagnose(healthy, tmp_path / "empty")
    with pytest.raises(BaseError, match="no config"):
        deltaw.diagnose(healthy, merged=tmp_path / "empty")
    other = save_base(tmp_path / "other", kind="gpt2")
    with pytest.raises(BadInput, match="is no model that this adapter was merged into"):
        deltaw.diagnose(healthy, merged=other)
    assert "the merged model" in [n["check"] for n in deltaw.diagnose(healthy, other, merged=base).not_made]
    with pytest.raises(BadInput, match="--limit"):
        deltaw.diagnose(healthy, limit=3)
    with pytest.raises(DataError, match="is no file"):
        deltaw.diagnose(healthy, data=tmp_path / "rows.jsonl")
    with pytest.raises(BadInput, match="another rank than the run's"):
        deltaw.diagnose(healthy, rank=6)
    with pytest.raises(BadInput, match="Did you mean 'nf4'"):
        deltaw.diagnose(healthy, merge_dtype="nf5")
    with pytest.raises(DataError, match="needs the run's training rows"):
        deltaw.diagnose(healthy, rank=3)


def test_diagnose_runs_finds_a_run_that_died_of_nan(base, tmp_path):
    with pytest.raises(WorkFailed, match="loss is"):
        run(base, tmp_path / "run", data=rows(48, 6), lr=20.0)
    assert kinds(tmp_path / "run") == ["alpha_misconfigured"]
