"""Pictures 2, 3, 5, 8, 11 and 12: counts and bytes are the planner's, and arithmetic's."""

from __future__ import annotations

import json

import pytest
from lab_bench import STARTER, Bench, numbers, texts
from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.errors import TargetError
from deltaw.lab import counts
from deltaw.lab.controls import read


def planned(*flags: str) -> dict[str, object]:
    """What `deltaw plan --json` says."""
    done = CliRunner().invoke(app, ["plan", *flags, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# 8 -----------------------------------------------------------------------------------------------------


def test_lab_counts_r_8_of_4096_is_65536_and_0_39_percent(tiny: Bench):
    plain = tiny(8, rank=8, d=4096)
    assert numbers(plain)["trained"] == 65_536
    assert texts(plain)["percent"] == "0.39 %"
    assert numbers(plain)["full"] == 16_777_216
    assert numbers(plain)["times"] == 256
    assert numbers(tiny(8, rank=16, d=4096))["trained"] == 131_072
    for point in plain["data"]["curve"]:
        assert point["share"] == pytest.approx(2 * point["rank"] / 4096)


# 2 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "rank", "targets", "wanted"),
    [
        ("llama-7b", 8, "all-linear", 19_988_480),
        ("llama-7b", 8, "q_proj,v_proj", 4_194_304),
        ("mistral-7b", 16, "q_proj,k_proj,v_proj,o_proj", 13_631_488),
        ("llama-70b", 16, "all-linear", 207_093_760),
        ("phi-2", 16, "q_proj,v_proj", 5_242_880),
    ],
)
def test_lab_counts_picture_2_has_the_counts_of_the_spec(tiny: Bench, model: str, rank: int, targets: str, wanted: int):
    plain = tiny(2, model=model, rank=rank, targets=targets)
    assert numbers(plain)["adapter"] == wanted == sum(r["adapter"] for r in plain["data"]["rows"])
    assert numbers(plain)["full"] == sum(r["full"] for r in plain["data"]["rows"])
    assert numbers(plain)["file"] == 4 * wanted


def test_lab_counts_targets_that_a_model_lacks_are_named(tiny: Bench):
    with pytest.raises(TargetError, match="q_proj"):
        tiny(2, model="gpt2", targets="q_proj,v_proj")


def test_lab_counts_models_are_ordered_by_size(tiny: Bench):
    sizes = list(tiny.lab.sizes.values())
    assert sizes == sorted(sizes)
    assert tiny.lab.sizes["llama-7b"] == 6_738_415_616
    assert "tiny" in tiny.lab.sizes


# 5 -----------------------------------------------------------------------------------------------------


def test_lab_counts_picture_5_is_16_bytes_a_parameter_and_2_p_copies(tiny: Bench):
    p, a = 6_738_415_616, 2 * 19_988_480
    plain = tiny(5, model="llama-7b", tasks=12, rank=16)
    found = numbers(plain)
    assert found["memory_full"] == 16 * p
    assert found["memory_lora"] == 2 * p + 16 * a
    assert found["copies"] == 12 * 2 * p
    assert found["adapters"] == 2 * p + 12 * 4 * a
    at = next(row for row in plain["data"]["storage"] if row["tasks"] == 12)
    assert (at["copies"], at["adapters"]) == (found["copies"], found["adapters"])


# 11 ----------------------------------------------------------------------------------------------------


def same_but_runtime(ours: dict[str, int], wanted: object) -> bool:
    """Whether two plans hold the same bytes by cause; `runtime` is what the process that asks has taken by then."""
    assert isinstance(wanted, dict)
    assert ours["runtime"] > 0
    return {**ours, "runtime": 0} == {**wanted, "runtime": 0}


@pytest.mark.starter
def test_lab_counts_the_bars_of_picture_11_are_deltaw_plans(starter: Bench):
    plain = starter(11, model=STARTER, rank=7, batch=2, length="256")
    for bar, method in zip(plain["data"]["bars"], ("full", "lora", "qlora"), strict=True):
        rank = [] if method == "full" else ["--rank", "7"]
        wanted = planned("--base", STARTER, "--method", method, "--batch", "2", "--length", "256", *rank)
        assert same_but_runtime(bar["bytes"], wanted["bytes"]), method
        assert bar["peak"] == sum(bar["bytes"].values()) == numbers(plain)[bar["method"]]


def test_lab_counts_a_shape_is_planned_as_by_deltaw_plan_too(tiny: Bench):
    c = read(tiny.pictures[11].controls, {"model": "llama-7b", "rank": 5, "batch": 1, "length": "128", "again": True})
    flags = ["--batch", "1", "--length", "128", "--rank", "5", "--checkpointing"]
    wanted = planned("--base", "llama-7b", "--method", "qlora", *flags)
    assert same_but_runtime(counts.planned(tiny.lab, c, "QLoRA").plain()["bytes"], wanted["bytes"])


# 3 and 12 ----------------------------------------------------------------------------------------------


def test_lab_counts_picture_3_costs_two_thin_products_or_nothing(tiny: Bench):
    plain = tiny(3, part="down_proj", rank=5)
    assert texts(plain)["shape"] == "32 x 40"
    assert numbers(plain)["frozen"] == 32 * 40
    assert numbers(plain)["adapter"] == numbers(plain)["extra"] == 5 * (32 + 40)
    assert numbers(plain)["differ"] < 1e-5
    assert numbers(tiny(3, part="down_proj", rank=5, merged=True))["extra"] == 0
    assert [p["role"] for p in plain["data"]["parts"]] == tiny.lab.roles


@pytest.mark.starter
def test_lab_counts_picture_12_counts_what_each_method_trains(starter: Bench):
    every = {key: True for key in ("lora", "dora", "houlsby", "prefix", "prompt", "ia3", "bitfit")}
    plain = starter(12, **every)
    found, rows = numbers(plain), {row["key"]: row for row in plain["data"]["methods"]}
    assert found["lora"] == 30 * sum(rows["lora"]["places"].values())
    assert found["dora"] == found["lora"] + 30 * (576 + 192 + 192 + 576 + 1536 + 1536 + 576)  # and a magnitude a row
    assert found["prefix"] == 20 * 192 + 192 * 193 + 2 * 30 * 192 * 193  # methods/prefix.py has the count
    assert found["ia3"] == 30 * (192 + 192 + 1536)
    assert found["prompt"] % 576 == 0
    assert found["houlsby"] == 30 * sum(rows["houlsby"]["places"].values())
    assert rows["lora"]["places"]["k_proj"] == 8 * (576 + 192)
    assert rows["bitfit"]["places"]["up_proj"] == 1536
    assert set(rows["ia3"]["places"]) == {"k_proj", "v_proj", "down_proj"}
    assert set(rows["houlsby"]["places"]) == {"after attention", "after ffn"}
    assert set(rows["prefix"]["places"]) == set(rows["prompt"]["places"]) == {"front"}


def test_lab_counts_nothing_lights_up_when_all_is_off(tiny: Bench):
    plain = tiny(12, lora=False, prefix=False)
    assert plain["data"]["methods"] == []
    assert numbers(plain) == {"none": 0}
