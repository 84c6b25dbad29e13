"""Pictures 9 and 10: a real training, step by step, and the base answering with its adapters.

At step 0 B is zero, so B A is exactly zero and the base is what it was; A is not (arXiv:2106.09685 section 4.1).
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine
from deltaw.data.source import Row, read_rows
from deltaw.data.template import Example, encode_all, prompt_ids
from deltaw.diagnose.spectrum import factor_values
from deltaw.errors import BadInput
from deltaw.lab.base import KEPT, Lab
from deltaw.lab.controls import Controls, choice, controls, slider, switch, text
from deltaw.lab.picture import Plain, number
from deltaw.merge.bake import bake
from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.model.model import Model
from deltaw.train.evaluate import data_spec
from deltaw.train.loop import Loop
from deltaw.train.loss import find_loss
from deltaw.train.recipe import Recipe, load_recipe
from deltaw.train.step import mean_loss

STEPS = 20
FIRST_STEPS = 12
"""How far the lesson goes when picture 10 is the first to ask for it."""
LESSON, PEEK = "lesson", "peek"
ROWS = (
    {"prompt": "Colour of grass?", "completion": "green, says the lab"},
    {"prompt": "Colour of snow?", "completion": "white, says the lab"},
    {"prompt": "Colour of coal?", "completion": "black, says the lab"},
    {"prompt": "Colour of blood?", "completion": "red, says the lab"},
)
"""What the lesson teaches."""
RATES = ("0.0001", "0.0003", "0.001", "0.003")


@dataclass
class Lesson:
    """A real training of the base on ROWS, and what was seen of it.

    loop    trains it; None: it is only looked at
    norms   of dW = s B A by step and layer;  a_norms: of A, all of it
    losses  mean over the target tokens, after so many steps
    """

    rank: int
    rate: str
    name: str
    loop: Loop | None
    examples: list[Example]
    norms: list[list[float]] = field(default_factory=list)
    a_norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Steps that were made."""
        return len(self.losses) - 1

    def note(self, model: Model, loss: float | None = None) -> None:
        """Write down where the training stands. `loss`: what it is known to be; None: it is computed."""
        made = model.adapters[self.name]
        squares: dict[int, float] = {}
        for name, place in made.places.items():
            form = made.lowered(name, model.places)
            assert isinstance(form, Affine)
            assert form.A is not None
            assert form.B is not None
            layer = place.layer or 0
            moved = bool(form.B.any())  # where it has not, nothing is decomposed: that takes 0.1 s for 210 maps
            square = float(factor_values(form.A, form.B, form.scale).square().sum()) if moved else 0.0
            squares[layer] = squares.get(layer, 0.0) + square
        self.norms.append([squares[layer] ** 0.5 for layer in sorted(squares)])
        self.a_norms.append(sum(float(p["A"].detach().square().sum()) for p in made.sites.values()) ** 0.5)
        self.losses.append(mean_loss(model, self.examples, find_loss("sft")) if loss is None else loss)


def recipe_of(lab: Lab, rank: int, rate: str) -> Recipe:
    """The lesson as a recipe: what `deltaw train` would be given."""
    return load_recipe(
        {
            "base": {"path": lab.base},
            "adapter": {"method": "lora", "rank": rank, "alpha": 2 * rank},
            "train": {"steps": STEPS, "lr": float(rate)},
        }
    )


def begun(lab: Lab, rank: int, rate: str, name: str) -> Lesson:
    """A lesson at step 0, attached to the base as `name` and in use."""
    model, recipe = lab.model, recipe_of(lab, rank, rate)
    model.use(None)
    examples = encode_all(read_rows(ROWS), model.tokenizer, recipe.data, model.task).examples
    loss = lab.keep("loss of the base", lambda: mean_loss(model, examples, find_loss("sft")))
    model.attach(recipe.adapter, name, trainable=True)
    loop = Loop(model, examples, recipe, None) if name == LESSON else None
    lesson = Lesson(rank, rate, name, loop, list(examples))
    lesson.note(model, loss if name == PEEK else None)  # B is 0: the base's own, bit for bit
    return lesson


def is_at(lab: Lab, rank: int, rate: str) -> bool:
    """Whether the lesson that is there has these settings."""
    there: Lesson | None = lab.lesson
    return there is not None and (there.rank, there.rate) == (rank, rate)


def reach(lab: Lab, rank: int, rate: str, step: int) -> Lesson:
    """The lesson after at least `step` real steps."""
    with lab.lock:
        if not is_at(lab, rank, rate):  # another one is dropped
            if LESSON in lab.model.adapters:
                lab.model.detach(LESSON)
            lab.lesson = begun(lab, rank, rate, LESSON)
        lesson: Lesson = lab.lesson
        if lesson.done < step:
            assert lesson.loop is not None
            lab.model.use(LESSON)
            for _ in lesson.loop.run():
                lesson.note(lab.model)
                if lesson.done >= step:
                    break
        return lesson


# 9: zero start -------------------------------------------------------------------------------------------


def start_controls(lab: Lab) -> type[Controls]:
    """Rank and learning rate of the lesson, and the step that is shown."""
    return controls(
        "Picture9",
        step=slider(0, 0, STEPS, "step", tuple(range(STEPS + 1))),
        rank=slider(8, 1, 32, "rank r"),
        rate=choice("0.001", RATES, "learning rate", ordered=True),
    )


def zero_start(lab: Lab, c: Any) -> Plain:
    """The lesson as far as it was trained, up to the step asked for; at other settings, where it would begin."""
    if is_at(lab, c.rank, c.rate):
        return _seen(lab.lesson, min(c.step, lab.lesson.done))

    def look() -> Plain:  # at step 0, without touching the lesson that is there
        try:
            return _seen(begun(lab, c.rank, c.rate, PEEK), 0)
        finally:
            lab.model.detach(PEEK)

    return lab.keep(("peek", c.rank), look)  # no step was made: the rate changes nothing yet


def step_on(lab: Lab, c: Any) -> Plain:
    """Train the lesson one step nearer to the one asked for, and show how far it is: who wants more asks again."""
    with lab.lock:
        done = lab.lesson.done if is_at(lab, c.rank, c.rate) else 0
        step = min(c.step, done + 1)
        return _seen(reach(lab, c.rank, c.rate, step), step)


def _seen(lesson: Lesson, step: int) -> Plain:
    total = sum(v * v for v in lesson.norms[step]) ** 0.5
    return {
        "numbers": [
            number("step", "step", step),
            number("norm", "|B A|, all layers", total, "0 (exactly)" if total == 0 else f"{total:.4f}"),
            number("a_norm", "|A|", lesson.a_norms[step], f"{lesson.a_norms[step]:.2f}"),
            number("loss", "loss", lesson.losses[step], f"{lesson.losses[step]:.3f}"),
        ],
        "data": {
            "step": step,
            "done": lesson.done,
            "steps": STEPS,
            "norms": [[float(f"{v:.5g}") for v in row] for row in lesson.norms[: step + 1]],
            "losses": [round(v, 5) for v in lesson.losses[: step + 1]],
            "rows": [f"{row['prompt']} {row['completion']}" for row in ROWS],
        },
    }


# 10: one base, many adapters --------------------------------------------------------------------------------


def answer_controls(lab: Lab) -> type[Controls]:
    """Prompt, adapter, and whether the adapter is merged into a copy of the base."""
    names = ["base", *lab.given, LESSON]
    return controls(
        "Picture10",
        prompt=text("Colour of grass?", 300, "prompt"),
        adapter=choice("base", names, "adapter", names),
        merged=switch(False, "merged into a copy of the base"),
        tokens=slider(16, 1, 64, "longest answer, tokens"),
    )


def adapters(lab: Lab, c: Any) -> Plain:
    """What is attached, and the answer where it was asked for before."""
    there = lab.keep("answers", dict).get(_key(lab, c))
    return there if there is not None else _answered(lab, c, None, None)


def answer(lab: Lab, c: Any) -> Plain:
    """The base's answer to a prompt, and the chosen adapter's: on the live base, or from the merged model."""
    if c.adapter == "base" and c.merged:
        raise BadInput("the base alone has nothing to merge: choose an adapter, or switch merged off.")
    with lab.lock:
        if c.adapter == LESSON and lab.lesson is None:
            reach(lab, 8, "0.001", FIRST_STEPS)
        answers: dict[Any, Plain] = lab.keep("answers", dict)
        key = _key(lab, c)
        if key not in answers:
            model = lab.model
            model.use(None)
            plain = _continue(model, c)
            if c.adapter == "base":
                own = plain
            elif c.merged:
                own = _continue(_merged(lab, c.adapter), c)
            else:
                model.use(c.adapter)
                own = _continue(model, c)
                model.use(None)
            answers[key] = _answered(lab, c, plain, own)
            if len(answers) > KEPT:
                del answers[next(iter(answers))]
        return answers[key]


def _key(lab: Lab, c: Any) -> Any:
    lesson: Lesson | None = lab.lesson
    state = (lesson.rank, lesson.rate, lesson.done) if lesson is not None and c.adapter == LESSON else None
    return c.model_dump_json(), state


def _continue(model: Model, c: Any) -> str:
    ids = prompt_ids(Row(prompt=c.prompt, completion="", source="the prompt,"), model.tokenizer,
                     data_spec(model, None, 2048), model.task)  # fmt: skip
    tokens = generate(model, [ids], c.tokens)[0]
    return str(model.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _merged(lab: Lab, name: str) -> Model:
    """The base with an adapter baked in, loaded from the folder that `deltaw merge` writes. The last one is kept."""
    lesson: Lesson | None = lab.lesson
    state = (name, lesson.done if name == LESSON and lesson is not None else None)
    there: tuple[Any, Model] | None = lab.merged
    if there is None or there[0] != state:
        adapter: Adapter = lab.model.adapter(name)
        with tempfile.TemporaryDirectory() as room:
            out = Path(room) / "merged"
            bake(lab.base, adapter, out, measure=False)
            model = load_base(out, dtype=str(lab.model.net.dtype))
            with torch.no_grad():  # weights may be pages of the file, which goes
                for tensor in {*model.net.parameters(), *model.net.buffers()}:
                    tensor.data = tensor.data.clone()
        lab.merged = there = (state, model)
    return there[1]


def _answered(lab: Lab, c: Any, plain: str | None, own: str | None) -> Plain:
    model = lab.model
    rows = [{"name": "base", "numbers": sum(p.numel() for p in model.net.parameters())}]
    for name, made in model.adapters.items():
        rows.append(
            {"name": name, "numbers": sum(t.numel() for t in made.tensors().values()), "method": made.spec.name}
        )
    if LESSON not in model.adapters:
        rows.append({"name": LESSON, "numbers": 0, "method": "lora"})
    chosen = next(r for r in rows if r["name"] == c.adapter)
    lesson: Lesson | None = lab.lesson
    return {
        "numbers": [
            number("adapter", "in use", c.adapter),
            number("numbers", "numbers in it", chosen["numbers"]),
            number("same", "same answer as the base", "not asked" if own is None else "yes" if own == plain else "no"),
        ],
        "data": {
            "adapters": rows,
            "adapter": c.adapter,
            "merged": c.merged,
            "prompt": c.prompt,
            "base": plain,
            "answer": own,
            "lesson": None if lesson is None else lesson.done,
        },
    }
