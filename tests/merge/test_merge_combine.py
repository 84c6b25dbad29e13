"""combine: one adapter, or one base, from several: equal to dense arithmetic in float64, whatever the methods are."""

from __future__ import annotations

import json

import pytest
import torch
from made_bases import logits, noisy, plain, renamed_base, stored
from made_deltas import applied, dense_changes, lora_change
from peft import LoraConfig, PeftModel, get_peft_model

from deltaw.merge.combine import combine
from deltaw.methods.bitfit import BitFit
from deltaw.methods.dora import Dora
from deltaw.methods.ia3 import Ia3
from deltaw.methods.longlora import LongLora
from deltaw.methods.lora import Lora
from deltaw.methods.vera import Vera
from deltaw.model.base import load_base
from deltaw.model.identity import OtherBaseWarning
from deltaw.store.peft import read_adapter
from models import ARCHITECTURES, make_ids, make_net

IDS = make_ids()
ATTENTION = ("q_proj", "v_proj")
MIXED = {
    "lora": Lora(rank=3, alpha=5),
    "rslora": Lora(rank=7, alpha=2, rslora=True, targets=(*ATTENTION, "down_proj")),
    "patterns": Lora(rank=2, alpha=11, rank_pattern={"q_proj": 5}, alpha_pattern={"o_proj": 3}),
}
WEIGHTS = [0.7, -0.4, 1.3]
# factors are rounded to float32 once: 2^-24 of each, and what the sums of some twelve of them make of it
CLOSE = 1e-5


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def made_of(base, specs) -> list:
    return [noisy(base, spec, seed=i + 1) for i, spec in enumerate(specs)]


@pytest.mark.parametrize("method", ["linear", "cat"])
@pytest.mark.parametrize("with_base", [True, False])
def test_factors_of_mixed_ranks_scales_and_signs_are_exact(saved, tmp_path, method, with_base):
    base = saved(make_net("llama"))
    adapters = made_of(base, MIXED.values())

    report = combine(adapters, WEIGHTS, method=method, out=tmp_path / "out", base=base if with_base else None)

    found = read_adapter(tmp_path / "out")
    wanted = dense_changes(base, adapters, WEIGHTS)
    assert len(found.sites) == 14
    for site in found.sites:
        assert relative(lora_change(found, site), wanted[f"{site}.weight"]) < CLOSE, site
    assert found.spec.rank_at(next(p for p in found.places if p.role == "q_proj")) == 3 + 7 + 5
    assert found.spec.rank_at(next(p for p in found.places if p.role == "up_proj")) == 3 + 2
    assert report.error == 0.0
    assert {s.site: s.rank for s in report.sites}["model.layers.1.mlp.down_proj"] == 3 + 7 + 2
    assert found.id == report.adapter
    assert found.fingerprint == adapters[0].fingerprint


def test_the_result_says_its_parents_and_how(saved, tmp_path):
    base = saved(make_net("llama"))
    adapters = made_of(base, MIXED.values())
    report = combine(
        adapters, WEIGHTS, method="dare_ties", density=0.3, rank=4, seed=7, out=tmp_path / "out", base=base
    )
    noted = read_adapter(tmp_path / "out").provenance
    assert noted["parents"] == [a.id for a in adapters] == list(report.parents)
    assert noted["combine"] == {
        "method": "dare_ties", "density": 0.3, "seed": 7, "shared_mask": False, "rank": 4, "weights": WEIGHTS,
    }  # fmt: skip
    assert json.loads(json.dumps(report.as_dict()))["weights"] == WEIGHTS


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2"])
def test_a_base_with_the_sum_of_every_method_written_in_is_exact(saved, tmp_path, kind):
    """Gains, biases, replaced modules, factors; Conv1D and tied embeddings among the architectures."""
    net = make_net(kind)
    base = saved(net)
    specs = [Lora(rank=3, alpha=5, bias="all", save_modules=(_last_norm(net),)), Dora(rank=2, alpha=7), Vera(rank=9)]
    specs += [Ia3()] if kind != "phi" else [Ia3(targets=("k_proj", "fc2"), feedforward=("fc2",))]
    specs += [BitFit()] if any("_proj.bias" in n or n.endswith("c_attn.bias") for n in stored(base)) else []
    adapters = made_of(base, specs)
    weights = [0.7, -0.4, 1.3, 0.5, -0.25][: len(specs)]

    report = combine(adapters, weights, base=base, into_base=tmp_path / "out")

    before, found, wanted = stored(base), stored(tmp_path / "out"), applied(base, adapters, weights)
    assert set(found) == set(before)
    changed = [n for n in found if not torch.equal(found[n], before[n])]
    assert len(changed) == report.n_tensors_changed > 14
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-6, msg=name)
    assert logits(tmp_path / "out", IDS).isfinite().all()


def _last_norm(net) -> str:
    return next(n for n, m in reversed(list(net.named_modules())) if "norm" in type(m).__name__.lower())


def test_a_sum_of_gains_and_biases_becomes_an_adapter_with_what_it_lost_said(saved, tmp_path):
    base = saved(make_net("llama"))
    specs = [Lora(rank=3, alpha=5, bias="all", save_modules=("norm",)), Dora(rank=2, alpha=7, targets=ATTENTION), Ia3()]
    adapters = made_of(base, specs)
    weights = [0.7, -0.4, 1.3]

    report = combine(adapters, weights, method="svd", rank=6, base=base, out=tmp_path / "out")

    found = read_adapter(tmp_path / "out")
    wanted = dense_changes(base, adapters, weights)
    for cut in report.sites:
        dense = wanted[f"{cut.site}.weight"]
        U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
        best = U[:, : cut.rank] * S[: cut.rank] @ Vt[: cut.rank]
        assert relative(lora_change(found, cut.site), best) < CLOSE
        # a sum of low-rank changes is not cut below its rank, so that nothing is lost there
        assert cut.error == pytest.approx(relative(best, dense), rel=1e-6, abs=1e-12)
        assert cut.rank == (3 if cut.site.endswith(("o_proj", "gate_proj", "up_proj")) else 6)
    assert report.error > 0.1
    exact = applied(base, adapters, weights)
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        value = next(r.value for r in found.replaced if r.tensor == name)
        torch.testing.assert_close(value.double(), exact[name], atol=1e-6, rtol=1e-6)
    for site, params in found.sites.items():
        torch.testing.assert_close(params["bias"].double(), exact[f"{site}.bias"], atol=1e-6, rtol=1e-6)
    model = load_base(base)
    model.attach(found)
    assert model.logits(IDS).isfinite().all()


def test_biases_alone_stay_biases(saved, tmp_path):
    base = saved(make_net("llama"))
    adapters = made_of(base, [BitFit(targets=ATTENTION), BitFit(targets=("q_proj", "up_proj"))])
    combine(adapters, [2.0, -0.5], base=base, out=tmp_path / "out")
    found, exact = read_adapter(tmp_path / "out"), applied(base, adapters, [2.0, -0.5])
    assert found.spec.name == "bitfit"
    assert {s.rpartition(".")[2] for s in found.sites} == {"q_proj", "v_proj", "up_proj"}
    for site, params in found.sites.items():
        torch.testing.assert_close(params["bias"].double(), exact[f"{site}.bias"], atol=1e-6, rtol=1e-6)
    load_base(base).attach(found)


@pytest.mark.parametrize("weight", [1.0, -2.5])
def test_one_adapter_alone_is_weighted(saved, tmp_path, weight):
    base = saved(make_net("llama"))
    (adapter,) = made_of(base, [MIXED["patterns"]])
    combine([adapter], [weight], out=tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    for site, dense in dense_changes(base, [adapter], [weight]).items():
        assert relative(lora_change(found, site.removesuffix(".weight")), dense) < CLOSE
    assert found.spec.targets == "all-linear"


def test_an_adapter_with_weight_0_costs_no_rank(saved, tmp_path):
    base = saved(make_net("llama"))
    adapters = made_of(base, MIXED.values())
    report = combine(adapters, [1.0, 0.0, 0.0], out=tmp_path / "out")
    assert {s.rank for s in report.sites} == {3}
    assert len(read_adapter(tmp_path / "out").provenance["parents"]) == 3


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma"])
def test_the_combined_adapter_computes_what_the_combined_base_does(saved, tmp_path, kind):
    """On a Conv1D, and with changes on one side of a tie."""
    base = saved(make_net(kind))
    wide = Lora(rank=4, alpha=3, targets=("c_attn", "wte")) if kind == "gpt2" else Lora(
        rank=4, alpha=3, targets=("q_proj", "embed_tokens")
    )  # fmt: skip
    adapters = made_of(base, [Lora(rank=3, alpha=5), wide])
    combine(adapters, [0.6, -0.3], out=tmp_path / "adapter", base=base)
    report = combine(adapters, [0.6, -0.3], base=base, into_base=tmp_path / "out", dtype="float32")
    assert report.untied
    model = load_base(base)
    model.attach(tmp_path / "adapter")
    with torch.no_grad():
        attached = model.logits(IDS)
    # two blocks of float32 sums of 32 to 40 terms
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached, atol=1e-4, rtol=0)
    assert (attached - logits(base, IDS)).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_rank_beyond_what_a_map_has_keeps_all_of_it(saved, tmp_path, kind):
    base = saved(make_net(kind))
    adapters = made_of(base, [Dora(rank=2, alpha=7), MIXED["lora"]])
    report = combine(adapters, method="svd", rank=1000, base=base, out=tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    wanted = dense_changes(base, adapters, [1.0, 1.0])
    assert len(report.sites) == len(wanted) > 7
    for cut in report.sites:
        dense = wanted[f"{cut.site}.weight"]
        dense = dense if kind == "llama" else dense.T
        assert cut.rank == min(dense.shape)
        assert relative(lora_change(found, cut.site), dense) < CLOSE
    assert report.error < 1e-12


def test_files_with_other_names_are_summed_through_the_network(tmp_path):
    base = renamed_base(tmp_path / "base")
    adapters = made_of(base, [Lora(rank=3, alpha=5), Dora(rank=2, alpha=7, targets=ATTENTION)])
    combine(adapters, [0.6, -0.3], base=base, into_base=tmp_path / "out")
    combine(adapters, [0.6, -0.3], method="svd", rank=1000, base=base, out=tmp_path / "adapter")
    model = load_base(base)
    model.attach(tmp_path / "adapter")
    with torch.no_grad():
        attached = model.logits(IDS)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), attached, atol=1e-4, rtol=0)
    assert (attached - logits(base, IDS)).abs().max() > 0.1


@pytest.mark.parity
def test_peft_reads_what_is_written_and_computes_the_same(saved, tmp_path):
    """Ranks of their own, biases, and modules that are replaced whole, beside factors cut from gains."""
    base = saved(make_net("llama"))
    norm = Lora(rank=3, alpha=5, bias="all", targets=("q_proj", "up_proj"), save_modules=("model.norm",))
    adapters = made_of(base, [norm, Dora(rank=2, alpha=7, targets=ATTENTION), MIXED["rslora"]])
    combine(adapters, WEIGHTS, method="svd", rank=4, base=base, out=tmp_path / "out")
    model = load_base(base)
    model.attach(tmp_path / "out")
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(plain(base), tmp_path / "out")(IDS).logits
        # two blocks of float32 sums of 32 to 40 terms
        torch.testing.assert_close(theirs, model.logits(IDS), atol=1e-4, rtol=0)
    assert len(set(read_adapter(tmp_path / "out").spec.rank_pattern.values())) > 0


PEFT_CONFIGS = {
    "llama": (
        {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "modules_to_save": ["lm_head"]},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 5}, "bias": "lora_only"},
    ),
    "gpt2": (
        {"target_modules": ["c_attn", "c_fc"], "use_dora": True, "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "alpha_pattern": {"c_attn": 7}},
    ),
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_adapters_that_peft_saved_are_summed_as_peft_merges_each(saved, tmp_path, kind):
    base = saved(make_net(kind))
    before, weights = stored(base), [0.7, -0.4]
    wanted = {n: t.double() for n, t in before.items()}
    for i, settings in enumerate(PEFT_CONFIGS[kind]):
        model = get_peft_model(plain(base), LoraConfig(r=3 + i, lora_alpha=5, task_type="CAUSAL_LM", **settings))
        rng = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
        model.save_pretrained(tmp_path / f"a{i}")
        for name, value in model.merge_and_unload().state_dict().items():
            if name in wanted:
                wanted[name] += weights[i] * (value.double() - before[name].double())

    with pytest.warns(OtherBaseWarning, match="unknown, not checked"):
        combine([tmp_path / "a0", tmp_path / "a1"], weights, base=base, into_base=tmp_path / "out")

    found = stored(tmp_path / "out")
    moved = [n for n in wanted if not torch.equal(found[n], before[n])]
    assert len(moved) == (2 * 14 + 1 if kind == "llama" else 2 * 4)
    for name in wanted:
        torch.testing.assert_close(found[name].double(), wanted[name], atol=2e-6, rtol=2e-6, msg=name)


def test_longlora_is_summed_where_the_positions_are_the_same(saved, tmp_path):
    base = saved(make_net("llama"))
    far = LongLora(rank=3, alpha=5, max_positions=128)
    adapters = [noisy(base, far), noisy(base, LongLora(rank=2, alpha=7, max_positions=128), seed=2)]
    combine(adapters, [0.6, -0.3], base=base, out=tmp_path / "adapter")
    combine(adapters, [0.6, -0.3], base=base, into_base=tmp_path / "out")
    model = load_base(base)
    model.attach(tmp_path / "adapter")
    with torch.no_grad():
        found = model.logits(IDS)
        model.detach()
        for i, adapter in enumerate(adapters):
            model.attach(adapter, name=str(i))
        model.use({"0": 0.6, "1": -0.3})
        wanted = model.logits(IDS)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(tmp_path / "out", IDS), wanted, atol=1e-4, rtol=0)
