"""Pictures 1, 4, 6, 7 and 13: what is drawn of matrices is what the library and arithmetic say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from lab_bench import Bench, numbers, texts

from deltaw.errors import BadInput, WorkFailed
from deltaw.formats import NF4Weight
from deltaw.lab import base
from deltaw.lab.base import Lab
from deltaw.lab.lowrank import made_update
from deltaw.merge.factors import Keep, cut_dense, directions


def singular(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.double())


def tail(values: torch.Tensor, rank: int) -> float:
    """The relative error of the best approximation of `rank`, by Eckart and Young."""
    return math.sqrt(float(values[rank:].square().sum() / values.square().sum()))


# 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.starter
@pytest.mark.parametrize("rank", [1, 5, 32, 64])
def test_lab_weights_the_error_of_picture_1_is_the_made_changes_tail(starter: Bench, rank: int):
    plain = starter(1, rank=rank, layer=3, target="up_proj")
    found = numbers(plain)
    assert found["parameters"] == rank * 128
    assert found["full"] == 4096
    assert found["error"] == pytest.approx(tail(singular(made_update(64)), rank), abs=1e-6)
    W = starter.lab.weight(3, "up_proj")[:64, :64]
    grid = plain["data"]["grids"][0]
    cells = torch.tensor(grid["cells"]).reshape(64, 64).double() / 127 * grid["limit"]
    inside = W.abs() < grid["limit"]
    assert float((cells - W)[inside].abs().max()) <= grid["limit"] / 254 * 1.01
    assert 0.5 < float(inside.double().mean()) < 1


@pytest.mark.starter
def test_lab_weights_picture_1_adds_what_it_shows(starter: Bench):
    grids = starter(1, rank=12)["data"]["grids"]
    W, _, BA, after = (torch.tensor(g["cells"]).double() / 127 * g["limit"] for g in grids)
    inside = after.abs() < 0.9 * grids[3]["limit"]
    inside &= (W.abs() < 0.99 * grids[0]["limit"]) & (BA.abs() < 0.99 * grids[2]["limit"])
    assert int(inside.sum()) > 3000
    assert float((W + BA - after)[inside].abs().max()) < grids[0]["limit"] / 80


# 6 -----------------------------------------------------------------------------------------------------


@pytest.mark.starter
@pytest.mark.parametrize(("layer", "target", "rank"), [(5, "k_proj", 7), (5, "o_proj", 100), (0, "q_proj", 576)])
def test_lab_weights_errors_of_picture_6_are_the_singular_tail(starter: Bench, layer: int, target: str, rank: int):
    W = starter.lab.weight(layer, target)
    values = singular(W)
    plain = starter(6, layer=layer, target=target, rank=rank)
    rank_error = tail(values, rank) if rank < len(values) else 0.0
    assert numbers(plain)["error"] == pytest.approx(rank_error, abs=2e-6)
    assert numbers(plain)["tail"] == pytest.approx(rank_error, abs=2e-6)
    assert numbers(plain)["parameters"] == rank * sum(W.shape)
    curve = plain["data"]["curves"][0]
    assert curve["error"] == pytest.approx(
        [tail(values, r) if r < len(values) else 0.0 for r in curve["rank"]], abs=1e-5
    )
    energy = values.square().cumsum(0) / values.square().sum()
    assert numbers(plain)["rank_90"] == int((energy < 0.9).sum()) + 1


def test_lab_weights_a_rank_beyond_the_matrix_is_refused_in_a_sentence(tiny: Bench):
    with pytest.raises(BadInput, match=r"k_proj of block 1 has at most 16 directions, and rank is 20\."):
        tiny(6, layer=1, target="k_proj", rank=20)
    with pytest.raises(BadInput, match="k_proj has at most 16 directions here, and rank is 20"):
        tiny(1, target="k_proj", rank=20)


# 7 -----------------------------------------------------------------------------------------------------


@pytest.mark.starter
def test_lab_weights_picture_7_sums_both_paths_at_a_real_input(starter: Bench):
    plain = starter(7, rank=4, layer=2, target="gate_proj")
    v = {name: torch.tensor(values) for name, values in plain["data"]["vectors"].items()}
    W = starter.lab.weight(2, "gate_proj")
    assert v["Wx"].tolist() == pytest.approx((W @ v["x"]).tolist(), abs=1e-3)
    assert len(v["Ax"]) == 4
    found = numbers(plain)
    assert found["adapter"] == 4 * (576 + 1536)
    assert found["frozen"] == 576 * 1536
    assert found["change_norm"] == pytest.approx(found["base_norm"] / 3, rel=1e-4)
    assert float((v["y"] - v["Wx"] - v["BAx"]).norm() / v["y"].norm()) < 0.02  # bfloat16
    assert found["merged"] < 1e-5


def test_lab_weights_picture_7_starts_at_the_base(tiny: Bench):
    plain = tiny(7, trained=False)
    assert numbers(plain)["change_norm"] == 0
    assert set(plain["data"]["vectors"]["BAx"]) == {0.0}


# 13 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true_rank", [1, 8, 19, 32])
def test_lab_weights_the_error_of_picture_13_is_zero_exactly_from_the_true_rank(tiny: Bench, true_rank: int):
    plain = tiny(13, true_rank=true_rank, rank=true_rank)
    assert numbers(plain)["plateau"] == true_rank == numbers(plain)["best"]
    seen = plain["data"]["seen"]
    assert seen[true_rank:] == [0.0] * (65 - true_rank)
    assert all(a > b for a, b in pairwise(seen[: true_rank + 1]))
    assert seen[true_rank - 1] > 1e-3
    assert numbers(plain)["parameters"] == 128 * true_rank


def test_lab_weights_with_noise_more_rank_leads_away_from_the_truth(tiny: Bench):
    plain = tiny(13, true_rank=8, noise=0.2, rank=64)
    truth = plain["data"]["truth"]
    assert numbers(plain)["best"] in (7, 8, 9)
    assert truth[64] == pytest.approx(0.2, abs=1e-5)
    assert min(truth) < 0.12
    assert numbers(plain)["error"] == pytest.approx(0.0, abs=1e-6)
    assert numbers(plain)["plateau"] == 64


# 4 -----------------------------------------------------------------------------------------------------

PRINTED_NF4 = [
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]  # fmt: skip
"""QLoRA (arXiv:2305.14314) appendix E."""


@pytest.mark.starter
def test_lab_weights_picture_4_shows_nf4s_sixteen_levels(starter: Bench):
    plain = starter(4, format="nf4")
    assert plain["data"]["levels"] == pytest.approx(PRINTED_NF4, abs=1e-7)
    assert numbers(plain)["levels"] == 16
    assert texts(plain)["bits"] == "4.500"
    assert texts(plain)["scales"] == "0.500"
    assert sum(b["share"] for b in plain["data"]["histogram"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.starter
def test_lab_weights_double_quantisation_costs_0_127_bits(starter: Bench):
    plain = starter(4, format="nf4", double=True, target="up_proj")
    assert texts(plain)["scales"] == "0.127"
    assert numbers(plain)["scales"] == pytest.approx(8 / 64 + 32 / (64 * 256), abs=2e-4)
    assert texts(plain)["bits"] == "4.127"


@pytest.mark.starter
def test_lab_weights_picture_4s_errors_are_the_formats(starter: Bench):
    W = starter.lab.weight(4, "v_proj")
    plain = starter(4, format="nf4", block="128", layer=4, target="v_proj")
    near = NF4Weight.quantised(W, block=128).dense(torch.float32)
    assert numbers(plain)["error"] == pytest.approx(float((W - near).norm() / W.norm()), rel=1e-5)
    column = float((W - near)[:, 7].norm() / W[:, 7].norm())
    assert plain["data"]["columns"][7] == pytest.approx(column, rel=1e-4)
    errors = {f["format"]: f["error"] for f in plain["data"]["formats"]}
    assert errors["fp16"] < errors["int8"] < errors["nf4"] < errors["int4"]
    assert errors["nf4"] < errors["fp4"]


def test_lab_weights_fp16_has_no_scales_to_quantise(tiny: Bench):
    with pytest.raises(BadInput, match="fp16 has no scales"):
        tiny(4, format="fp16", double=True)
    assert numbers(tiny(4, format="fp16"))["bits"] == 16.0


def test_lab_weights_the_first_directions_of_a_matrix_are_its_cut(tiny: Bench):
    """What picture 6 relies on when it keeps one decomposition for every rank."""
    W = tiny.lab.weight(0, "up_proj")
    (A, B), cut = tiny.lab.directions(0, "up_proj").factors(W, 5), cut_dense(W, Keep(5), "up")
    assert A.shape == cut.A.shape
    assert B.shape == cut.B.shape
    assert torch.allclose(B @ A, cut.B @ cut.A, atol=2e-7)
    A, B = tiny.lab.directions(0, "up_proj").factors(W, min(W.shape))
    assert torch.allclose(B @ A, W, atol=2e-7)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_lab_weights_directions_by_the_gram_matrix_are_the_exact_ones(shape: tuple[int, int]):
    W = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) @ torch.diag(0.7 ** torch.arange(shape[1]))
    W[:, 3] = 0.0  # a direction of nothing
    found, exact = directions(W, "W"), torch.linalg.svd(W.double(), full_matrices=False)
    top = float(exact.S[0])
    assert torch.allclose(found.values, exact.S, atol=2e-8 * top)
    for rank in (1, 5, 20):
        A, B = found.factors(W, rank)
        assert (A.shape, B.shape) == ((rank, shape[1]), (shape[0], rank))
        wanted = exact.U[:, :rank] * exact.S[:rank] @ exact.Vh[:rank]
        assert torch.allclose((B @ A).double(), wanted, atol=2e-6 * top)


def test_lab_weights_a_matrix_that_is_not_finite_has_no_directions():
    W = torch.ones(4, 3)
    W[1, 2] = torch.nan
    with pytest.raises(WorkFailed, match="block 1 up_proj: the change holds NaN"):
        directions(W, "block 1 up_proj")


def test_lab_weights_decomposed_matrices_are_kept_within_their_bytes_the_last_used(tiny_folder, monkeypatch):
    lab = Lab(str(tiny_folder))
    places = [(0, "up_proj"), (1, "up_proj"), (0, "gate_proj")]
    first, *_ = (lab.directions(*place) for place in places[:2])
    monkeypatch.setattr(base, "KEPT_BYTES", 2 * first.nbytes)
    lab.directions(*places[0])
    lab.directions(*places[2])
    assert list(lab._directions) == [places[0], places[2]]
    assert lab.directions(*places[0]) is first
    monkeypatch.setattr(base, "KEPT_BYTES", 1)
    lab.directions(*places[1])
    assert list(lab._directions) == [places[1]]
