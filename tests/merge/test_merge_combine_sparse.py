"""TIES, DARE and pruning by magnitude: on dense changes, exact in a base, and cut to a rank in an adapter."""

from __future__ import annotations

import pytest
import torch
from made_bases import noisy, stored
from made_deltas import applied, dense_changes, lora_change
from peft.utils import merge_utils

from deltaw.merge.combine import combine
from deltaw.merge.sums import Way, drop_mask, total, trim_mask
from deltaw.methods.dora import Dora
from deltaw.methods.lora import Lora
from deltaw.store.peft import read_adapter
from models import make_net

WEIGHTS = [0.7, -0.4, 1.3]
DENSITY = 0.3
KEPT = 0.5  # of an even number of numbers: PEFT and we keep equally many
SPECS = (
    Lora(rank=3, alpha=5),
    Lora(rank=7, alpha=2, rslora=True, targets=("q_proj", "v_proj", "down_proj")),
    Dora(rank=2, alpha=11, targets=("q_proj", "up_proj")),
)


def kept(delta, density):
    """The share of a tensor that is largest in size, by sorting."""
    flat = delta.flatten()
    order = flat.abs().argsort(descending=True)[: int(density * len(flat))]
    out = torch.zeros_like(flat)
    out[order] = flat[order]
    return out.view_as(delta)


def slow_magnitude(deltas, weights):
    return sum(w * kept(d, DENSITY) for w, d in zip(weights, deltas, strict=True))


def slow_ties(deltas, weights):
    """TIES, one number after the other."""
    voted = torch.stack([w * kept(d, DENSITY) for w, d in zip(weights, deltas, strict=True)]).flatten(1)
    out = torch.zeros(voted.shape[1], dtype=torch.float64)
    for j, column in enumerate(voted.T):
        sign = column.sum().sign()
        agree = [v for v in column if v * sign > 0]
        out[j] = sum(agree) / len(agree) if agree else 0.0
    return out.view_as(deltas[0])


SLOW = {"magnitude": slow_magnitude, "ties": slow_ties}


@pytest.fixture
def base(saved):
    return saved(make_net("llama", num_hidden_layers=1))


@pytest.fixture
def adapters(base):
    return [noisy(base, spec, seed=i + 1) for i, spec in enumerate(SPECS)]


@pytest.mark.parametrize("method", SLOW)
def test_a_base_with_the_sum_written_in_is_the_slow_formula(base, adapters, tmp_path, method):
    combine(adapters, WEIGHTS, method=method, density=DENSITY, base=base, into_base=tmp_path / "out")
    found, wanted = stored(tmp_path / "out"), applied(base, adapters, WEIGHTS, SLOW[method])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("method", SLOW)
def test_an_adapter_is_the_cut_of_the_dense_result_and_says_what_it_lost(base, adapters, tmp_path, method):
    report = combine(adapters, WEIGHTS, method=method, density=DENSITY, rank=5, base=base, out=tmp_path / "out")
    found, wanted = read_adapter(tmp_path / "out"), dense_changes(base, adapters, WEIGHTS, SLOW[method])
    assert len(report.sites) == 7
    lost = 0.0
    for cut in report.sites:
        dense = wanted[f"{cut.site}.weight"]
        U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
        best = U[:, :5] * S[:5] @ Vt[:5]
        assert float((lora_change(found, cut.site) - best).norm() / best.norm()) < 1e-5
        assert cut.error == pytest.approx(float((dense - best).norm() / dense.norm()), rel=1e-6)
        assert cut.norm == pytest.approx(float(dense.norm()), rel=1e-9)
        lost += float((dense - best).square().sum())
    size = sum(float(wanted[f"{c.site}.weight"].square().sum()) for c in report.sites)
    assert report.error == pytest.approx((lost / size) ** 0.5, rel=1e-6)


# Against PEFT's formulas, on the same dense changes ----------------------------------------------------


def changes(n=3, size=(24, 40)):
    rng = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=rng, dtype=torch.float64) for _ in range(n)]


def ours(deltas, weights, **way):
    return total([(i, w, d) for i, (w, d) in enumerate(zip(weights, deltas, strict=True))], Way(**way), "x")


@pytest.mark.parity
@pytest.mark.parametrize("method", ["magnitude", "ties"])
def test_pruning_and_ties_are_pefts_on_dense_changes(method):
    deltas, weights = changes(), [0.7, 0.7, 0.7]  # one sign: PEFT votes before it weights, and so cannot see others
    theirs = {"magnitude": merge_utils.magnitude_prune, "ties": merge_utils.ties}[method]
    wanted = theirs(deltas, torch.tensor(weights, dtype=torch.float64), KEPT)
    torch.testing.assert_close(ours(deltas, weights, name=method, density=KEPT), wanted, atol=1e-12, rtol=0)


@pytest.mark.parity
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("shared", [True, False])
def test_dare_is_pefts_on_dense_changes_with_the_same_masks(monkeypatch, method, shared):
    deltas, weights = changes(), [0.7, 0.7, 0.7] if method == "dare_ties" else WEIGHTS
    masks = [drop_mask((24, 40), KEPT, 11, "x", 0 if shared else i) for i in range(3)]
    assert torch.equal(masks[0], masks[1]) == shared
    supply = iter(masks)
    monkeypatch.setattr(merge_utils.torch, "bernoulli", lambda t: next(supply).to(t.dtype))
    wanted = getattr(merge_utils, method)(deltas, torch.tensor(weights, dtype=torch.float64), KEPT)
    found = ours(deltas, weights, name=method, density=KEPT, seed=11, shared_mask=shared)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


# What each does --------------------------------------------------------------------------------------------


def test_dare_keeps_the_expected_change_and_depends_on_seed_tensor_and_adapter_alone():
    delta = changes(1)[0]
    mean = sum(ours([delta], [1.0], name="dare_linear", density=0.25, seed=s) for s in range(400)) / 400
    # a number's variance is d^2 (1 - p) / p = 3 d^2, over 400 draws a deviation of 0.087 |d|; five of them
    assert ((mean - delta).abs() <= 5 * 0.087 * delta.abs()).all()
    first = drop_mask((24, 40), 0.25, 0, "x", 0)
    assert torch.equal(first, drop_mask((24, 40), 0.25, 0, "x", 0))
    for other in (drop_mask((24, 40), 0.25, 1, "x", 0), drop_mask((24, 40), 0.25, 0, "y", 0)):
        assert not torch.equal(first, other)
    assert abs(float(first.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 960) ** 0.5


def test_density_1_drops_nothing():
    deltas = changes()
    plain = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True))
    for method in ("dare_linear", "magnitude"):
        torch.testing.assert_close(ours(deltas, WEIGHTS, name=method, density=1.0), plain, atol=1e-12, rtol=0)


def test_ties_counts_only_those_that_agree_and_a_negative_weight_votes_against():
    one = torch.tensor([4.0, 4.0, 4.0, 1.0], dtype=torch.float64)
    two = torch.tensor([2.0, -1.0, 0.0, -1.0], dtype=torch.float64)
    assert ours([one, two], [1.0, 1.0], name="ties", density=1.0).tolist() == [3.0, 4.0, 4.0, 0.0]
    assert ours([one, two], [1.0, -1.0], name="ties", density=1.0).tolist() == [4.0, 2.5, 4.0, 1.0]
    assert ours([one], [-0.5], name="ties", density=1.0).tolist() == [-2.0, -2.0, -2.0, -0.5]


def test_pruning_keeps_one_number_at_least_and_equals_together():
    assert trim_mask(torch.tensor([1.0, -3.0, 2.0]), 0.01).tolist() == [False, True, False]
    assert trim_mask(torch.tensor([1.0, -3.0, 3.0, 2.0]), 0.25).tolist() == [False, True, True, False]
