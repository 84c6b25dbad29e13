"""Pictures 9 and 10: a real training from exactly zero, and real answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lab_bench import Bench, numbers, texts

from deltaw.core.adapter import Adapter
from deltaw.data.source import Row
from deltaw.data.template import prompt_ids
from deltaw.errors import BadInput
from deltaw.lab.base import Lab
from deltaw.lab.controls import read
from deltaw.lab.live import LESSON, PEEK, recipe_of
from deltaw.methods import Lora
from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.train.evaluate import data_spec
from models import randomise


@pytest.fixture
def fresh(tiny_folder: Path) -> Bench:
    return Bench(Lab(str(tiny_folder)))


@pytest.fixture(scope="module")
def adapter_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter of the tiny base that changes every answer."""
    model = load_base(tiny_folder, dtype="float32")
    model.attach(Lora(rank=3, alpha=7), "noise", trainable=True)
    randomise(model)
    adapter: Adapter = model.adapter()
    folder = tmp_path_factory.mktemp("adapter") / "noise"
    adapter.save(folder)
    return folder


def dense_norm(lab: Lab) -> float:
    """|dW| of the lesson over all layers, by making every dW."""
    made = lab.model.adapters[LESSON]
    squares = 0.0
    for name, params in made.sites.items():
        change = made.spec.scale_at(made.places[name]) * params["B"].detach().double() @ params["A"].detach().double()
        squares += float(change.square().sum())
    return squares**0.5


def test_lab_live_the_norm_of_b_a_is_exactly_zero_at_step_0(fresh: Bench):
    plain = fresh(9)
    assert numbers(plain)["norm"] == 0.0
    assert texts(plain)["norm"] == "0 (exactly)"
    assert plain["data"]["norms"] == [[0.0, 0.0]]
    assert numbers(plain)["a_norm"] > 1
    assert fresh.act(9)["numbers"] == plain["numbers"]
    lesson = fresh.lab.lesson
    fresh.lab.model.use(None)
    ids = torch.tensor([lesson.examples[0].input_ids])
    base = fresh.lab.model.logits(ids)
    fresh.lab.model.use(LESSON)
    assert fresh.lab.model.logits(ids).equal(base)


def test_lab_live_steps_are_real_and_their_norms_are_those_of_the_dense_change(fresh: Bench):
    plain = fresh.act(9, step=4, rank=3, rate="0.003")
    losses = plain["data"]["losses"]
    assert len(losses) == 5 == len(plain["data"]["norms"])
    assert losses[-1] < losses[0]
    assert numbers(plain)["norm"] == pytest.approx(dense_norm(fresh.lab), rel=1e-6)
    assert all(v > 0 for v in plain["data"]["norms"][1])
    back = fresh(9, step=2, rank=3, rate="0.003")
    assert back["data"]["losses"] == losses[:3]
    assert numbers(back)["step"] == 2
    assert back["data"]["done"] == 4


def test_lab_live_one_request_trains_one_step_at_most_and_says_how_far_it_is(fresh: Bench):
    picture = fresh.pictures[9]
    asked = read(picture.controls, {"step": 20, "rank": 2})
    for done in (1, 2, 3):
        plain = picture.act(fresh.lab, asked)
        assert (numbers(plain)["step"], plain["data"]["done"], fresh.lab.lesson.done) == (done, done, done)
    back = picture.act(fresh.lab, read(picture.controls, {"step": 2, "rank": 2}))
    assert (numbers(back)["step"], back["data"]["done"]) == (2, 3)
    other = picture.act(fresh.lab, read(picture.controls, {"step": 5, "rank": 3}))
    assert (numbers(other)["step"], other["data"]["done"]) == (1, 1)


def test_lab_live_an_address_gives_the_same_training_again(fresh: Bench, tiny_folder: Path):
    first = fresh.act(9, step=3)["data"]
    fresh.act(9, step=1, rank=2)  # another lesson in between
    assert fresh.act(9, step=3)["data"] == first
    assert Bench(Lab(str(tiny_folder))).act(9, step=3)["data"] == first


def test_lab_live_a_get_trains_nothing(fresh: Bench):
    plain = fresh(9, step=5)
    assert plain["data"]["done"] == 0
    assert numbers(plain)["step"] == 0
    assert fresh.lab.lesson is None
    fresh.act(9, step=2)
    fresh(9, step=0, rank=3)
    assert (fresh.lab.lesson.rank, fresh.lab.lesson.done) == (8, 2), "looking at other settings drops nothing"
    assert list(fresh.lab.model.adapters) == ["lesson"]
    assert fresh.act(9, step=3)["data"]["done"] == 3


def test_lab_live_the_lesson_is_the_recipe_that_train_would_run(fresh: Bench):
    recipe = recipe_of(fresh.lab, 5, "0.003")
    assert recipe.adapter == Lora(rank=5, alpha=10)
    assert (recipe.train.steps, recipe.train.lr) == (20, 0.003)


def answer_of(folder: Path, adapter: Path | None, prompt: str, tokens: int) -> str:
    """What `deltaw generate` would print."""
    model = load_base(folder, dtype="auto")
    if adapter is not None:
        model.attach(adapter)
    row = Row(prompt=prompt, completion="", source="the prompt,")
    ids = prompt_ids(row, model.tokenizer, data_spec(model, None, 2048), model.task)
    return str(model.tokenizer.decode(generate(model, [ids], tokens)[0], skip_special_tokens=True)).strip()


def test_lab_live_answers_are_the_engines_on_the_base_and_merged(tiny_folder: Path, adapter_folder: Path):
    bench = Bench(Lab(str(tiny_folder), {"noise": adapter_folder}))
    given = {"prompt": "abc", "tokens": 9}
    plain = bench.act(10, adapter="noise", **given)
    assert plain["data"]["base"] == answer_of(tiny_folder, None, "abc", 9)
    assert plain["data"]["answer"] == answer_of(tiny_folder, adapter_folder, "abc", 9)
    assert plain["data"]["answer"] != plain["data"]["base"]
    assert texts(plain)["same"] == "no"
    merged = bench.act(10, adapter="noise", merged=True, **given)
    assert merged["data"]["answer"]
    assert merged["data"]["answer"] != plain["data"]["base"]
    assert texts(bench.act(10, **given))["same"] == "yes"
    assert bench(10, adapter="noise", **given) == plain, "an answer is remembered"
    assert bench(10, prompt="xyz")["data"]["answer"] is None, "a GET asks nobody"


def test_lab_live_the_first_one_to_ask_for_the_lesson_trains_it(fresh: Bench):
    plain = fresh.act(10, adapter="lesson", tokens=2)
    assert plain["data"]["lesson"] == 12 == fresh.lab.lesson.done
    assert numbers(plain)["numbers"] == sum(t.numel() for t in fresh.lab.model.adapters[LESSON].tensors().values())


def test_lab_live_the_base_alone_cannot_be_merged(fresh: Bench):
    with pytest.raises(BadInput, match="nothing to merge"):
        fresh.act(10, adapter="base", merged=True)


@pytest.mark.parametrize("name", ["base", "lesson", "peek", "a b", ""])
def test_lab_live_names_that_adapters_cannot_have_are_refused(tiny_folder: Path, name: str):
    with pytest.raises(BadInput, match="cannot be called"):
        Lab(str(tiny_folder), {name: tiny_folder})


def test_lab_live_another_rank_or_rate_shows_where_its_lesson_would_begin(fresh: Bench):
    fresh.act(9, step=1)
    seen = {rate: fresh(9, rank=3, rate=rate) for rate in ("0.0001", "0.003")}
    assert seen["0.0001"] == seen["0.003"], "no step was made"
    assert fresh(9)["data"]["done"] == 1, "the lesson that is there stays"
    assert PEEK not in fresh.lab.model.adapters
    begun = fresh.act(9, rank=3, step=0)
    assert begun["numbers"] == seen["0.003"]["numbers"]
