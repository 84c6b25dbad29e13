"""Recipes: what is refused and how it is said, overrides, paths, and the way back to plain data."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import deltaw
from deltaw.errors import RecipeError
from deltaw.train.recipe import Recipe, load_recipe

PLAIN = {"base": {"path": "somewhere"}, "adapter": {"method": "lora", "rank": 3, "alpha": 5}}


def refused(plain: dict, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(plain, overrides)
    message = str(caught.value)
    assert "pydantic" not in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("section", "key", "meant"),
    [
        ("", "trian", "train"),
        ("base", "dtyp", "dtype"),
        ("data", "max_token", "max_tokens"),
        ("train", "warmup", "warmup_ratio"),
        ("train.optimizer", "weight_decy", "weight_decay"),
        ("eval", "evry_steps", "every_steps"),
        ("adapter", "rnk", "rank"),
    ],
)
def test_an_unknown_key_is_named_with_the_near_one(section: str, key: str, meant: str) -> None:
    where = f"{section}.{key}" if section else key
    message = refused(PLAIN, f"{where}=1")
    assert repr(key) in message or repr(where) in message
    assert f"Did you mean {meant!r}" in message


@pytest.mark.parametrize("plain", [{}, {"adapter": {"method": "lora"}}, {"base": {"format": "dense"}}])
def test_a_missing_base_or_adapter_is_named(plain: dict) -> None:
    message = refused(plain)
    assert "is missing" in message
    assert ("'base" in message) == ("path" not in plain.get("base", {}))


def test_a_budget_is_a_number_of_gb_above_0() -> None:
    assert "above 0" in refused(PLAIN, "budget.memory_gb=0")
    assert "memory_gb" in refused(PLAIN, "budget.memory_mb=8")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=0", "lr must be a finite number above 0, not 0"),
        ("train.lr=-1e-3", "lr must be"),
        ("train.lr=.nan", "lr must be"),
        ("train.lr=.inf", "lr must be"),
        ("train.lr=fast", "train.lr"),
        ("train.epochs=0", "epochs must be"),
        ("train.epochs=.inf", "epochs must be"),
        ("train.steps=0", "steps must be"),
        ("train.steps=2.5", "train.steps"),
        ("train.tokens_per_step=0", "tokens_per_step must be"),
        ("train.micro_tokens=-1", "micro_tokens must be"),
        ("train.threads=0", "threads must be"),
        ("train.warmup_ratio=2", "warmup_ratio must be between 0 and 1, not 2"),
        ("train.warmup_ratio=.nan", "warmup_ratio must be"),
        ("train.final_lr_ratio=-0.1", "final_lr_ratio must be"),
        ("train.clip=-1", "clip must be"),
        ("train.clip=.nan", "clip must be"),
        ("train.schedule=cosinus", "'cosine'"),
        ("train.save_every_s=-1", "save_every_s must be"),
        ("train.save_every_s=.nan", "save_every_s must be"),
        ("train.optimizer.lora_plus_ratio=0", "lora_plus_ratio must be"),
        ("train.optimizer.weight_decay=-0.1", "weight_decay must be"),
        ("train.optimizer.eps=0", "optimizer.eps must be a finite number above 0"),
        ("train.optimizer.weight_decay=.nan", "weight_decay must be"),
        ("train.optimizer.eps=-1", "eps must be"),
        ("train.optimizer.betas=[0.9, 1.5]", "betas must be"),
        ("train.optimizer.betas=[0.9]", "betas"),
        ("train.optimizer=sgd", "'adamw'"),
        ("eval.every_steps=0", "every_steps must be at least 1"),
        ("eval.patience=0", "patience must be"),
        ("eval.limit=-3", "limit must be"),
        ("eval.metric=rouge", "'perplexity'"),
        ("eval.keep=first", "'last'"),
        ("data.max_tokens=1", "data.max_tokens"),
        ("data.too_long=drop", "'skip'"),
        ("base.dtype=int8", "'float32'"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(override: str, said: str) -> None:
    message = refused(PLAIN, override)
    assert said in message
    assert override.partition("=")[0].rpartition(".")[2] in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=0", "Lora.rank: must be at least 1"),
        ("adapter.alpha=.nan", "Lora.alpha: must be a finite number"),
        ("adapter.alpha=0", "Lora.alpha: must be a finite number"),
        ("adapter.dropout=1", "Lora.dropout: must be at least 0 and below 1"),
        ("adapter.method=lroa", "unknown method 'lroa'. Did you mean 'lora'"),
        ("adapter.layers=first", "Lora.layers: is 'first'"),
        ("adapter=lora", "adapter"),
    ],
)
def test_a_method_s_complaint_comes_through_as_one_sentence(override: str, said: str) -> None:
    assert said in refused(PLAIN, override)


@pytest.mark.parametrize("override", ["adapter.method=xyz", "adapter={method: full, rank: 3}", "train.lr=-1"])
def test_a_complaint_ends_with_one_full_stop(override: str) -> None:
    said = refused(PLAIN, override)
    assert said.endswith(".")
    assert not said.endswith("..")
    assert ".;" not in said


def test_overrides_are_read_as_people_write_numbers() -> None:
    texts = ["train.lr=5e-4", "adapter.alpha=1e1", "train.epochs=.5", "train.clip=1E0", "train.seed=12"]
    made = load_recipe(PLAIN, [*texts, "train.checkpointing=true", "adapter.targets=[q_proj, v_proj]"])
    train = made.train
    assert (train.lr, made.adapter.alpha, train.epochs) == (5e-4, 10.0, 0.5)
    assert (train.clip, train.seed, train.checkpointing) == (1.0, 12, True)
    assert made.adapter.targets == ("q_proj", "v_proj")


def test_a_file_s_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("base: somewhere\nadapter: {method: lora}\ntrain: {lr: 5e-4, optimizer: {eps: 1e-8}}\n")
    made = load_recipe(file)
    assert (made.train.lr, made.train.optimizer.eps) == (5e-4, 1e-8)


def test_an_override_reaches_into_sections_that_are_absent_or_shorthand() -> None:
    plain = {"base": "somewhere", "adapter": {"method": "lora"}, "train": {"optimizer": "adamw"}}
    made = load_recipe(
        plain,
        ["base.dtype=float32", "train.optimizer.lora_plus_ratio=16", "eval.patience=2", "data.separator=''"],
    )
    assert (made.base.path, made.base.dtype) == ("somewhere", "float32")
    assert made.train.optimizer.lora_plus_ratio == 16
    assert (made.eval.patience, made.data.separator) == (2, "")
    assert load_recipe(PLAIN, ["base=elsewhere"]).base.path == "elsewhere"


def test_overrides_do_not_change_what_they_were_laid_over() -> None:
    before = {"base": {"path": "somewhere"}, "adapter": {"method": "lora"}}
    load_recipe(before, ["base.path=elsewhere", "train.lr=1"])
    assert before == {"base": {"path": "somewhere"}, "adapter": {"method": "lora"}}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr", "write key=value"),
        ("=3", "write key=value"),
        ("train.lr.x=3", "holds 0.1, not settings"),
        ("train.lr=[1", "is not YAML"),
    ],
)
def test_an_override_that_is_none_is_refused(override: str, said: str) -> None:
    assert said in refused({**PLAIN, "train": {"lr": 0.1}}, override)


def test_paths_are_taken_from_the_recipe_s_folder_where_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for name in ("rows.jsonl", "labels.json"):
        (tmp_path / name).write_text("[]")
    file = tmp_path / "r.yaml"
    file.write_text(
        "base: base\nadapter: {method: lora}\ndata: {train: rows.jsonl, valid: absent.jsonl}\n"
        "eval: {metric: choice, labels: labels.json}\n"
    )
    made = load_recipe(file)
    assert made.base.path == str(tmp_path / "base")
    assert made.data.train == str(tmp_path / "rows.jsonl")
    assert made.data.valid == "absent.jsonl"
    assert made.eval.labels == str(tmp_path / "labels.json")
    absolute = load_recipe(file, [f"data.train={tmp_path / 'labels.json'}", "base.path=org/name"])
    assert absolute.data.train == str(tmp_path / "labels.json")
    assert absolute.base.path == "org/name"
    assert load_recipe(file, ["data.train=hf:org/set"]).data.train == "hf:org/set"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: [unclosed", "is not YAML"),
        ("", "holds nothing, not a recipe"),
        ("- a\n- b\n", "holds list, not a recipe"),
        ("base: !!python/object:os.system x", "is not YAML"),
        ("base: x\nadapter: {method: lora}\n1: 2\n", "keys must be words"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=said) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_a_missing_or_unreadable_recipe_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecipeError, match=f"No recipe at {path}"):
            load_recipe(path)
    (tmp_path / "latin.yaml").write_bytes("base: caf\xe9".encode("latin-1"))
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(tmp_path / "latin.yaml")


def test_plain_reads_back_to_an_equal_recipe() -> None:
    whole = load_recipe(
        {
            "base": {"path": "b", "dtype": "float32"},
            "adapter": {
                "method": "lora", "rank": 3, "alpha": 5, "rslora": True, "dropout": 0.25, "layers": "0-1",
                "targets": ["q_proj"], "rank_pattern": {"q_proj": 2}, "bias": "lora_only",
                "new_tokens": ["<a>"],
            },
            "data": {"train": "t.jsonl", "too_long": "skip", "template": "chat", "separator": "\n"},
            "train": {"epochs": 1.5, "lr": 3e-4, "micro_tokens": 7, "optimizer": {"betas": [0.8, 0.95]}},
            "eval": {"metric": "choice", "labels": "l.json", "patience": 3},
        }
    )  # fmt: skip
    assert load_recipe(whole.plain()) == whole
    assert load_recipe(whole) is whole
    assert load_recipe(whole, ["train.lr=3e-4"]) == whole
    assert load_recipe(load_recipe(PLAIN).plain()) == load_recipe(PLAIN)


def test_a_recipe_takes_paths_and_settings_as_objects() -> None:
    made = load_recipe({"base": {"path": Path("b")}, "adapter": deltaw.Lora(rank=3, alpha=5)})
    assert made == load_recipe({"base": "b", "adapter": {"method": "lora", "rank": 3, "alpha": 5}})
    assert isinstance(made, Recipe)
    assert math.isclose(made.adapter.alpha, 5)


def test_the_recipes_that_ship_load() -> None:
    folder = Path(__file__).parents[2] / "recipes"
    files = sorted(folder.glob("*.yaml"))
    assert files
    for file in files:
        made = load_recipe(file)
        assert Path(made.data.train).is_file(), file


def test_train_recipe_rate_follows_the_settings_that_want_another() -> None:
    rates = {
        0.001: {"method": "lora"},
        0.0002: {"method": "lora", "start": "pissa"},
        0.003: {"method": "houlsby", "placement": "parallel"},
    }
    for rate, adapter in rates.items():
        recipe = load_recipe({"base": {"path": "b"}, "adapter": adapter, "train": {"steps": 1}})
        assert recipe.train.lr == rate


def test_train_recipe_schedule_is_the_methods_own_unless_it_is_said() -> None:
    said = {"lora": "hold", "dora": "hold", "longlora": "hold", "full": "cosine", "ia3": "cosine"}
    for method, schedule in said.items():
        plain = {"base": "b", "adapter": {"method": method}}
        assert load_recipe(plain).train.schedule == schedule
        assert load_recipe(plain, ["train.schedule=linear"]).train.schedule == "linear"
