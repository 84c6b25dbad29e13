"""Settings that make no sense are refused with the key, the value and a near name."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError

from deltaw import Lora
from deltaw.core.site import LinearSite
from deltaw.core.spec import Start
from deltaw.errors import BadInput, DeltawError, SpecError, near
from deltaw.formats.dense import DenseWeight
from deltaw.methods import METHODS, method_class, spec_from

SITE = LinearSite("model.layers.0.self_attn.q_proj", 24, 40, has_bias=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, r"Lora\.rank: must be at least 1 \(got 0\)"),
        ({"rank": -3}, "rank: must be at least 1"),
        ({"rank": 2.5}, r"Lora\.rank"),
        ({"alpha": math.nan}, r"Lora\.alpha: must be a finite number other than 0 \(got nan\)"),
        ({"alpha": math.inf}, "alpha: must be a finite number"),
        ({"alpha": 1e39}, "alpha: must be a finite number other than 0"),  # not in float32
        ({"alpha": 0}, "alpha: must be a finite number other than 0"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and below 1"),
        ({"dropout": math.nan}, "dropout: must be at least 0 and below 1"),
        ({"rnak": 3}, "unknown setting 'rnak' for Lora. Did you mean 'rank'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: holds a rank that is not from 1 to"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern: must be a finite number other than 0"),
        ({"layers": "1-x"}, r"layers: is '1-x'; write a list \[0, 1\] or a range"),
        ({"bias": "some"}, r"Lora\.bias"),
        ({"init_a": "pissa"}, r"Lora\.init_a"),
        ({"method": "dora"}, "method: is 'dora', but these settings belong to method 'lora'"),
        ({"rank": 0, "alpha": math.nan}, r"rank: .*; Lora\.alpha: "),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, said):
    with pytest.raises(SpecError, match=said):
        Lora(**settings)


def test_an_unknown_method_is_refused_with_the_near_name():
    with pytest.raises(SpecError, match=r"unknown method 'lorra'\. Did you mean 'lora'"):
        method_class("lorra")


def test_settings_go_through_plain_data_unchanged():
    spec = Lora(rank=3, alpha=5, targets=["q_proj"], layers="0-1", rank_pattern={"up_proj": 7}, bias="all")
    assert spec_from(spec.model_dump(mode="json")) == spec


def test_settings_are_frozen():
    spec = Lora(rank=3)
    with pytest.raises(ValidationError, match="frozen"):
        spec.rank = 4


def test_every_method_is_registered_once():
    names = [m.name for m in METHODS]
    assert len(METHODS) >= 2
    assert len(set(names)) == len(names)


def test_the_scale_is_alpha_over_r_or_over_its_root():
    assert Lora(rank=3, alpha=5).scale_at(SITE) == 5 / 3
    assert Lora(rank=3, alpha=5, rslora=True).scale_at(SITE) == 5 / math.sqrt(3)


@pytest.mark.parametrize(
    ("pattern", "rank"),
    [
        ({"q_proj": 7}, 7),
        ({"proj": 7}, 3),  # whole parts of the path only
        ({"layers.0.self_attn.q_proj": 7}, 7),
        ({"layers.1.self_attn.q_proj": 7}, 3),
        ({r"model\.layers\.\d+\.self_attn\.q_proj": 7}, 7),
        ({"self_attn.*": 7, "q_proj": 8}, 7),  # the first match wins
    ],
)
def test_patterns_match_at_the_end_of_the_path_and_the_first_wins(pattern, rank):
    assert Lora(rank=3, alpha=5, rank_pattern=pattern).shapes(SITE)["A"] == (rank, 24)
    alphas = {key: 2.0 * value for key, value in pattern.items()}
    alpha = 2.0 * rank if rank != 3 else 5.0
    assert Lora(rank=3, alpha=5, alpha_pattern=alphas).scale_at(SITE) == alpha / 3


def test_a_starts_random_and_b_at_zero():
    weight = DenseWeight(torch.zeros(40, 24))
    for init_a in ("kaiming", "gaussian"):
        spec = Lora(rank=3, alpha=5, init_a=init_a)
        made = spec.init(SITE, Start(torch.Generator().manual_seed(1), weight))
        again = spec.init(SITE, Start(torch.Generator().manual_seed(1), weight))
        assert torch.equal(made["A"], again["A"])
        assert not bool(made["B"].any())
        assert made["A"].shape == (3, 24)
        assert float(made["A"].abs().min()) > 0


def test_kaiming_draws_within_its_bound_and_gaussian_with_its_deviation():
    wide = LinearSite("x", 10_000, 40)
    rng = torch.Generator().manual_seed(1)
    kaiming = Lora(rank=4).init(wide, Start(rng))["A"]
    # uniform in +-1/sqrt(in): torch's kaiming_uniform_(a=sqrt(5)); of 40,000 draws the largest is near the bound
    assert 0.0099 < float(kaiming.abs().max()) <= 0.01
    gaussian = Lora(rank=4, init_a="gaussian").init(wide, Start(rng))["A"]
    # standard deviation 1/r; its estimate from 40,000 draws deviates by 1/sqrt(80,000), seven times that is 2.5%
    assert abs(float(gaussian.std()) - 0.25) < 0.025 * 0.25


def test_an_embedding_starts_with_a_at_zero_since_its_columns_are_looked_up():
    site = LinearSite("model.embed_tokens", 53, 32, "embedding")
    made = Lora(rank=3).init(site, Start(torch.Generator().manual_seed(1)))
    assert not bool(made["A"].any())
    assert bool(made["B"].all())


def test_errors_are_also_the_builtin_that_fits():
    assert issubclass(SpecError, BadInput)
    assert issubclass(BadInput, ValueError)
    assert issubclass(BadInput, DeltawError)
    assert (BadInput.exit_code, DeltawError.exit_code) == (2, 1)


def test_near_names_nothing_when_nothing_is_near():
    assert near("zzz", ["rank", "alpha"]) == ""
    assert near("rang", ["rank", "alpha"]) == " Did you mean 'rank'?"
