"""The corrected counts of the articles, from shapes alone."""

from __future__ import annotations

import pytest

from deltaw.errors import BaseError, RecipeError, TargetError
from deltaw.plan.network import find_config, shapes
from deltaw.plan.rules import rules_of_thumb
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def planner(
    path: str, adapter: dict | None = None, rows: int = 1, length: int = 8, *, whole: bool = False, **base
) -> Planner:
    plain = {"base": {"path": path, **base}, "adapter": adapter or {"method": "lora"}}
    return Planner(load_recipe(plain), Work.of_rows(rows, length), whole=whole)


@pytest.mark.parametrize(
    ("base", "settings", "trainable"),
    [
        ("7B", {"rank": 8}, 19_988_480),
        ("mistral-7b", {"rank": 16, "targets": QKVO}, 13_631_488),
        ("70B", {"rank": 16}, 207_093_760),
        ("phi-2", {"rank": 16, "targets": ["q_proj", "v_proj"]}, 5_242_880),
        ("65B", {"rank": 16}, 199_884_800),
        ("7B", {"rank": 8, "targets": ["layers.0.self_attn.q_proj"]}, 65_536),
        ("7B", {"rank": 16, "targets": ["layers.0.self_attn.q_proj"]}, 131_072),
    ],
)
def test_trainable_counts_are_those_of_the_shapes(base, settings, trainable):
    made = planner(base, {"method": "lora", **settings})
    counts = made._made(made.base_of(made.recipe), made.recipe).counts
    assert counts.trainable == trainable
    assert counts.adapter == counts.gradients == 4 * trainable


def test_65b_in_nf4_is_its_codes_and_scales_exactly():
    made = planner("65B", {"method": "lora", "rank": 16}, whole=True, format="nf4", double_quant=True)
    planned = made._made(made.base_of(made.recipe), made.recipe)
    counts = planned.counts
    maps = [s for s in planned.model.places.sites.values() if s.kind == "linear" and not s.is_head]
    n = sum(s.in_features * s.out_features for s in maps)
    dense = counts.parameters - n
    assert counts.weights - n // 2 == pytest.approx(2 * dense, abs=1000)  # beside them the rotary frequencies
    assert counts.constants == sum((b := s.in_features * s.out_features // 64) + 4 * -(-b // 256) + 4 for s in maps)
    assert counts.constants == pytest.approx(0.127 / 8 * n, rel=2e-3)
    assert counts.parameters / 2 == pytest.approx(32.5e9, rel=5e-3)


def test_moments_of_the_65b_adapter_are_1_6_gb():
    from deltaw.train.planning import optimizer_bytes

    made = planner("65B", {"method": "lora", "rank": 16})
    base = made.base_of(made.recipe)
    planned = made._made(base, made.recipe)
    assert made._optimizer(base, planned, made.recipe) == 2 * 4 * 199_884_800
    model = planner("65B", {"method": "lora", "rank": 16}, whole=True)._made(base, made.recipe).model
    assert optimizer_bytes(model.trainable(), made.recipe.train) == 2 * 4 * 199_884_800


@pytest.mark.parametrize(("name", "n"), [("7B", 6_738_415_616), ("70B", 68_976_648_192), ("gpt2", 124_439_808)])
def test_rules_of_thumb_are_16_bytes_and_2_p_and_16_p_lora(name, n):
    made = planner(name, {"method": "lora", "rank": 8})
    counts = made._made(made.base_of(made.recipe), made.recipe).counts
    assert counts.parameters == n
    rules = {r["rule"]: r["bytes"] for r in rules_of_thumb(counts)}
    assert rules["full, 16 bytes a parameter"] == 16 * n
    assert rules["LoRA, 2 P + 16 P_lora"] == 2 * n + 16 * counts.trainable
    assert all(r["assumes"] for r in rules_of_thumb(counts))


def test_full_fine_tuning_is_16_bytes_a_parameter_here_too():
    plan = planner("gpt2", {"method": "full"}, dtype="float32").plan()
    c = plan.counts
    assert c.adapter == 0
    assert c.gradients + c.optimizer == 12 * c.parameters
    assert c.weights == pytest.approx(4 * c.parameters, rel=1e-3)


def test_every_shape_that_is_shipped_makes_a_network():
    from deltaw.plan.network import Base, network_of

    sizes = {}
    for name, config in shapes().items():
        net = network_of(Base(name, config, None))
        sizes[name] = sum(p.numel() for p in {id(p): p for p in net.parameters()}.values())
    assert len(sizes) >= 15
    assert sizes["smollm2-135m"] == 134_515_008
    assert sizes["mistral-7b"] == 7_241_732_096
    assert sizes["qwen2.5-0.5b"] == 494_032_768
    assert sizes["llama-3-8b"] == 8_030_261_248
    assert sizes["phi-2"] == 2_779_683_840


def test_what_is_no_base_is_an_error_with_near_names():
    with pytest.raises(BaseError, match="mistral-7b"):
        find_config("mistal-7b")
    with pytest.raises(TargetError, match="q_proj"):
        planner("gpt2", {"method": "lora", "targets": ["q_proj"]}).plan()
    with pytest.raises(RecipeError, match="dense"):
        planner("gpt2", {"method": "full"}, format="nf4").plan()
    with pytest.raises(BaseError, match="1024"):
        planner("gpt2", length=2000).plan()
