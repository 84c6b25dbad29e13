"""Which sites a method's settings name: lists, suffixes, expressions, exclusions, layers; near names in errors."""

from __future__ import annotations

import pytest

from deltaw import Lora
from deltaw.core.site import LinearSite
from deltaw.core.targets import select
from deltaw.errors import TargetError

LAYERS = 3
ROLES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
SITES = [
    LinearSite("model.embed_tokens", 53, 32, "embedding"),
    *(LinearSite(f"model.layers.{i}.{role}", 32, 40) for i in range(LAYERS) for role in ROLES),
    LinearSite("lm_head", 32, 53, is_head=True),
]


def chosen(**settings) -> list[str]:
    return [s.name.removeprefix("model.layers.") for s in select(Lora(**settings), SITES)]


def test_all_linear_is_every_map_but_head_and_embedding():
    wanted = [f"{i}.{role}" for i in range(LAYERS) for role in ROLES]
    assert chosen() == wanted
    assert chosen(targets="all-linear") == wanted
    assert chosen(targets="All-Linear") == wanted


def test_a_list_matches_last_parts_in_the_models_order():
    assert chosen(targets=["up_proj", "q_proj"]) == [
        f"{i}.{role}" for i in range(LAYERS) for role in ("self_attn.q_proj", "mlp.up_proj")
    ]


def test_a_name_matches_whole_parts_only():
    with pytest.raises(TargetError, match="'proj'"):
        chosen(targets=["proj"])


def test_a_dotted_suffix_and_a_full_name_match():
    assert chosen(targets=["1.mlp.up_proj", "model.layers.2.self_attn.q_proj"]) == [
        "1.mlp.up_proj",
        "2.self_attn.q_proj",
    ]


def test_an_expression_must_match_the_whole_path():
    assert chosen(targets=r".*\.[02]\.mlp\.(up|down)_proj") == [
        "0.mlp.up_proj", "0.mlp.down_proj", "2.mlp.up_proj", "2.mlp.down_proj",
    ]  # fmt: skip
    with pytest.raises(TargetError, match="No linear map matches the expression 'up_proj'"):
        chosen(targets="up_proj")


def test_embedding_and_head_are_reached_by_name():
    assert chosen(targets=["embed_tokens", "lm_head"]) == ["model.embed_tokens", "lm_head"]


def test_exclude_takes_names_suffixes_or_an_expression_out():
    wanted = [f"{i}.mlp.{role}" for i in range(LAYERS) for role in ("up_proj", "down_proj")]
    assert chosen(exclude=["q_proj", "k_proj"]) == wanted
    assert chosen(exclude=r".*self_attn.*") == wanted
    assert chosen(targets=["q_proj"], exclude=["model.layers.1.self_attn.q_proj"]) == [
        "0.self_attn.q_proj",
        "2.self_attn.q_proj",
    ]


@pytest.mark.parametrize(
    ("layers", "numbers"), [([0, 2], [0, 2]), ("1-2", [1, 2]), ("0", [0]), ("0-2", [0, 1, 2]), ([0], [0])]
)
def test_layers_keep_a_list_or_a_range_of_blocks(layers, numbers):
    assert chosen(targets=["q_proj"], layers=layers) == [f"{i}.self_attn.q_proj" for i in numbers]


def test_layers_leave_out_what_belongs_to_no_block():
    assert chosen(targets=["q_proj", "lm_head"], layers=[1]) == ["1.self_attn.q_proj"]


def test_the_first_number_in_a_path_is_the_block():
    assert LinearSite("model.layers.3.experts.1.up_proj", 1, 1).layer == 3
    assert LinearSite("h.11.attn.c_attn", 1, 1).layer == 11
    assert LinearSite("lm_head", 1, 1).layer is None


def test_a_site_below_a_saved_module_is_not_targeted():
    assert chosen(save_modules=["mlp"]) == [f"{i}.{r}" for i in range(LAYERS) for r in ROLES[:2]]
    assert chosen(targets=["q_proj", "lm_head"], save_modules=["lm_head"]) == [
        f"{i}.self_attn.q_proj" for i in range(LAYERS)
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ["q_proj", "vq_proj"]}, r"target 'vq_proj' matches no linear map.*Did you mean 'q_proj'"),
        ({"targets": ["up_projj"]}, r"'up_projj' matches no linear map.*Did you mean 'up_proj'.*It has: down_proj"),
        ({"targets": []}, r"target \[\] matches no linear map.*It has"),
        ({"targets": "("}, r"targets: '\(' is not a regular expression"),
        ({"exclude": ["lm_heat"]}, r"exclude 'lm_heat' matches no linear map.*Did you mean 'lm_head'"),
        ({"exclude": "["}, r"exclude: '\[' is not a regular expression"),
        ({"layers": [0, 3, 7]}, r"layers: \[3, 7\] not among the targeted blocks \(there are 0 to 2\)"),
        ({"layers": "1-3"}, r"layers: \[3\] not among"),
        ({"targets": ["lm_head"], "layers": [0]}, r"layers: \[0\] not among the targeted blocks \(there are none\)"),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "leaves no place to train"),
    ],
)
def test_what_matches_nothing_is_an_error_with_near_names(settings, said):
    with pytest.raises(TargetError, match=said):
        chosen(**settings)
