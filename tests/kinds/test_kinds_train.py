"""Classifiers and encoder-decoders are trained, evaluated, resumed and planned by the same code as causal models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from made_kinds import LABELS, NAMED, answered, labelled, make_net, make_tokenizer, save_base

import deltaw
from deltaw.data import DataSpec, Row, collate, encode, encode_all, marked, prompt_ids, read_rows
from deltaw.data.task import Task, read_labels
from deltaw.errors import BaseError, DataError, RecipeError
from deltaw.methods import BitFit, Dora, Houlsby, Ia3, PrefixTuning, Prompt, PTuning, Vera
from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.model.model import Model
from deltaw.store.peft import read_adapter
from deltaw.train.evaluate import evaluate_rows, log_likelihoods
from deltaw.train.events import Done, Eval
from deltaw.train.loss import sft
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from deltaw.train.run import train
from deltaw.train.step import mean_loss, step_gradient
from models import randomise

CLASSIFY, ANSWER = Task("classify", tuple(LABELS)), Task("seq2seq")
METHODS = {
    "lora": deltaw.Lora(rank=3, alpha=5, dropout=0.3),
    "dora": Dora(rank=3, alpha=5),
    "ia3": Ia3(),
    "vera": Vera(rank=4, targets=("query", "value", "k", "v")),
    "bitfit": BitFit(),
    "houlsby": Houlsby(bottleneck=5),
    "prompt": Prompt(n_tokens=3),
    "prefix": PrefixTuning(n_tokens=3, projection=False),
    "ptuning": PTuning(n_tokens=3, hidden=9),
    "full": deltaw.Full(),
}


def method_for(name: str, kind: str):
    spec = METHODS[name]
    if name == "vera":
        return spec.model_copy(update={"targets": ("query", "value") if kind == "bert" else ("k", "v")})
    return spec


CASES = [(kind, name) for kind in ("bert", "t5") for name in METHODS if (kind, name) != ("t5", "bitfit")]


def rows_for(kind: str) -> list[dict[str, str]]:
    return answered() if kind == "t5" else labelled()


def examples_for(kind: str, n: int = 7):
    task = ANSWER if kind == "t5" else CLASSIFY
    return encode_all(read_rows(rows_for(kind)[:n]), make_tokenizer(kind), DataSpec(), task).examples


def recipe(folder: Path, kind: str, **sections: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "base": {"path": str(folder), "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16, "dropout": 0.1},
        "data": {} if kind == "t5" else {"labels": LABELS},
        "train": {"steps": 60, "tokens_per_step": 60, "lr": 0.02, "save_every_s": 1000},
        "eval": {"metric": "exact", "every_steps": 20},
    }
    return plain | {name: {**plain.get(name, {}), **more} for name, more in sections.items()}


# Rows -----------------------------------------------------------------------------------------------


def test_a_text_ends_with_its_labels_number():
    tokenizer = make_tokenizer("bert")
    row = Row(prompt="w5 w6 w7", completion=" noun.place ", line=3)
    example = encode(row, tokenizer, DataSpec(), CLASSIFY)
    assert example.input_ids == (1, 5, 6, 7, 2, 2)
    assert example.is_target == (False,) * 5 + (True,)
    assert prompt_ids(row, tokenizer, DataSpec(), CLASSIFY) == [1, 5, 6, 7, 2]
    cut = encode(row, tokenizer, DataSpec(max_tokens=4), CLASSIFY)
    assert (cut.input_ids, cut.was_cut) == ((1, 5, 6, 2, 2), True)  # as tokenizers truncate: [SEP] stays
    assert cut.input_ids[:4] == tuple(tokenizer("w5 w6 w7", truncation=True, max_length=4)["input_ids"])
    assert not encode(row, tokenizer, DataSpec(max_tokens=5), CLASSIFY).was_cut
    assert encode(row, tokenizer, DataSpec(max_tokens=4, too_long="skip"), CLASSIFY) is None
    assert marked(example, tokenizer, CLASSIFY) == [("[CLS] w5 w6 w7 [SEP]", False), ("noun.place", True)]


def test_an_answer_follows_its_source_each_as_the_tokenizer_writes_it():
    tokenizer = make_tokenizer("t5")
    row = Row(prompt="w5 w6 w7", completion="w8 w9")
    example = encode(row, tokenizer, DataSpec(), ANSWER)
    assert example.input_ids == (5, 6, 7, 2, 8, 9, 2)
    assert example.is_target == (False,) * 4 + (True,) * 3
    cut = encode(row, tokenizer, DataSpec(max_tokens=2), ANSWER)
    assert (cut.input_ids, cut.n_targets, cut.was_cut) == ((5, 2, 8, 2), 2, True)
    assert encode(row, tokenizer, DataSpec(append_end=False), ANSWER).input_ids == (5, 6, 7, 2, 8, 9)
    assert encode(Row(prompt="w5", completion=""), tokenizer, DataSpec(), ANSWER).input_ids == (5, 2, 2)
    assert encode(Row(prompt="", completion="w5"), tokenizer, DataSpec(), ANSWER).input_ids == (2, 5, 2)
    assert prompt_ids(row, tokenizer, DataSpec(max_tokens=2), ANSWER) == [5, 6, 7, 2]


@pytest.mark.parametrize(
    ("row", "task", "spec", "said"),
    [
        (Row(prompt="w5", completion="noun.plac", line=4), CLASSIFY, {}, r"line 4: completion 'noun\.plac' is none of"),
        (Row(text="w5"), CLASSIFY, {}, "classifies needs rows of prompt"),
        (Row(messages=[{"role": "user", "content": "w5"}]), ANSWER, {}, "encoder-decoder needs rows of prompt"),
        (Row(prompt="w5", completion="w6"), ANSWER, {"template": "chat"}, "set data.template=plain"),
    ],
)
def test_rows_that_do_not_fit_are_refused(row, task, spec, said):
    with pytest.raises(DataError, match=said):
        encode(row, make_tokenizer("bert"), DataSpec(**spec), task)


def test_labels_are_read_from_a_list_or_a_file(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    assert read_labels(tmp_path / "labels.json") == read_labels(LABELS) == LABELS
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, labelled())))
    (tmp_path / "recipe.yaml").write_text(
        json.dumps({"base": "x", "adapter": {"method": "lora"}, "data": {"labels": "labels.json"}})
    )
    loaded = load_recipe(tmp_path / "recipe.yaml")
    assert loaded.data.labels == str(tmp_path / "labels.json")  # beside the recipe


# Computing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_pack_equals_its_documents_alone_and_gradients_do_not_depend_on_the_split(kind, name):
    gradients = []
    for micro_tokens, checkpointing in ((None, False), (1, False), (30, True)):
        model = Model(make_net(kind))
        model.attach(method_for(name, kind))
        if name != "full":
            randomise(model)
        examples = examples_for(kind)
        with torch.no_grad():
            together = model.pack_logits(collate(examples))
            alone = torch.cat([model.pack_logits(collate([e])) for e in examples])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)  # float32, padding adds exact zeros only
        step_gradient(model, examples, sft, micro_tokens=micro_tokens, checkpointing=checkpointing, seed=5)
        gradients.append({n: t.grad for n, t in model.trainable().items() if t.grad is not None})
    assert len(gradients[0]) > 0
    largest = max(float(value.abs().max()) for value in gradients[0].values())
    for other in gradients[1:]:
        assert set(other) == set(gradients[0])
        # float32 and sharp attention; with a float64 base they agree to 3e-8
        for key, value in gradients[0].items():
            torch.testing.assert_close(other[key], value, rtol=0, atol=5e-5 * largest, msg=key)


def test_the_loss_is_transformers_own():
    for kind in ("bert", "t5"):
        model, examples = Model(make_net(kind)), examples_for(kind, 3)
        total = n = 0.0
        for e in examples:
            source = torch.tensor([e.input_ids[: len(e.input_ids) - e.n_targets]])
            labels = torch.tensor([e.input_ids[-e.n_targets :]])
            with torch.no_grad():
                out = model.net(input_ids=source, labels=labels[0] if kind == "bert" else labels)
            total, n = total + float(out.loss) * e.n_targets, n + e.n_targets
        assert mean_loss(model, examples, sft) == pytest.approx(total / n, rel=1e-5)
        assert -sum(log_likelihoods(model, examples)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", [None, "lora", "prompt", "prefix", "ptuning"])
def test_answers_are_transformers_greedy_ones(name):
    model = Model(make_net("t5"), make_tokenizer("t5"))
    if name:
        model.attach(METHODS[name])
        randomise(model, size=0.6)
    prompts = [list(e.input_ids[: len(e.input_ids) - e.n_targets]) for e in examples_for("t5")]
    answers = generate(model, prompts, 6, batch_size=4)
    for prompt, found in zip(prompts, answers, strict=True):  # the slow way: the whole answer again for each token
        wanted: list[int] = []
        for _ in range(6):
            decoder = torch.tensor([[0, *wanted]])
            with torch.no_grad():
                token = int(model.logits(torch.tensor([prompt]), None, decoder)[0, -1].argmax())
            if token == 2:
                break
            wanted.append(token)
        assert found == wanted
    assert len({tuple(a) for a in answers}) > 1
    if name in (None, "lora"):
        own = model.net.generate(input_ids=torch.tensor([prompts[0]]), max_new_tokens=6, do_sample=False)[0].tolist()
        assert [t for t in own[1:] if t != 2] == answers[0]


def test_a_classifier_has_no_words():
    with pytest.raises(DataError, match="no words to answer with"):
        generate(Model(make_net("bert"), make_tokenizer("bert")), [[1, 5, 2]], 3)


# Runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "encoder", "t5"])
def test_a_run_learns_its_rows_and_its_adapter_remembers_them(kind, tmp_path):
    base, rows = save_base(kind, tmp_path / "base"), rows_for(kind)
    events = list(train(recipe(base, kind), tmp_path / "run", train_rows=rows, valid_rows=rows))
    best = max(e.value for e in events if isinstance(e, Eval))
    assert best > 0.9
    adapter = read_adapter(tmp_path / "run")
    assert adapter.provenance["kind"] == ("seq2seq" if kind == "t5" else "classify")
    labels = adapter.provenance.get("labels")
    assert labels == (None if kind == "t5" else LABELS)
    model = load_base(base, labels=labels)
    model.attach(adapter)
    result = evaluate_rows(model, read_rows(rows), "exact", DataSpec(), predictions=True)
    assert result["value"] == best
    assert [p["wanted"] for p in result["predictions"]] == [r["completion"] for r in rows]
    if kind != "t5":
        assert evaluate_rows(model, read_rows(rows), "choice", DataSpec())["value"] == best


@pytest.mark.parametrize("kind", ["masked", "t5"])
def test_a_run_goes_on_bit_for_bit(kind, tmp_path):
    base, rows = save_base(kind, tmp_path / "base"), rows_for(kind)
    plain = recipe(base, kind, train={"steps": 12, "save_every_s": 0.0}, eval={"metric": "loss", "every_steps": 100})
    list(train(plain, tmp_path / "whole", train_rows=rows, valid_rows=rows))
    run = train(plain, tmp_path / "cut", train_rows=rows, valid_rows=rows)
    for event in run:
        if type(event).__name__ == "Saved" and event.step == 5:
            break
    run.close()
    done = list(train(plain, tmp_path / "cut", train_rows=rows, valid_rows=rows))[-1]
    assert isinstance(done, Done)
    assert read_adapter(tmp_path / "cut").id == read_adapter(tmp_path / "whole").id


def test_labels_can_be_those_of_the_base(tmp_path):
    base = save_base("bert", tmp_path, **NAMED)
    plain = recipe(base, "bert", train={"steps": 2})
    del plain["data"]
    list(train(plain, tmp_path / "run", train_rows=labelled(), valid_rows=labelled()))
    assert read_adapter(tmp_path / "run").provenance["labels"] == LABELS


def test_full_fine_tuning_writes_a_classifier(tmp_path):
    base = save_base("masked", tmp_path / "base")
    plain = recipe(base, "masked", adapter={}, train={"steps": 2})
    plain["adapter"] = {"method": "full"}
    list(train(plain, tmp_path / "run", train_rows=labelled(), valid_rows=labelled()))
    model = load_base(tmp_path / "run" / "model")
    assert (model.kind, model.task.labels) == ("classify", tuple(LABELS))


@pytest.mark.parametrize("metric", ["json", "perplexity"])
def test_metrics_of_words_are_refused_for_a_classifier(metric, tmp_path):
    base = save_base("bert", tmp_path / "base")
    plain = recipe(base, "bert", eval={"metric": metric})
    with pytest.raises(RecipeError, match=f"Metric '{metric}' is of answers in words"):
        list(train(plain, tmp_path / "run", train_rows=labelled(), valid_rows=labelled()))


def test_perplexity_and_json_are_of_an_encoder_decoders_answers(tmp_path):
    model = load_base(save_base("t5", tmp_path))
    rows = read_rows([{"prompt": "w5 w6", "completion": "w7"}, {"prompt": "w8", "completion": "w9 w10"}])
    found = evaluate_rows(model, rows, "perplexity", DataSpec())
    examples = encode_all(rows, model.tokenizer, DataSpec(), model.task).examples
    assert found["value"] == pytest.approx(math.exp(-sum(log_likelihoods(model, examples)) / 5))
    assert found["target_tokens"] == 5
    numbers = read_rows([{"prompt": "w5 w6", "completion": "7"}])
    assert evaluate_rows(model, numbers, "json", DataSpec())["n"] == 1


def test_a_head_that_has_learned_nothing_is_not_evaluated(tmp_path):
    model = load_base(save_base("masked", tmp_path), labels=LABELS)
    with pytest.raises(BaseError, match="fresh and has learned nothing"):
        evaluate_rows(model, read_rows(labelled()), "exact", DataSpec())


def test_biases_of_a_t5_are_not_there_to_train():
    from deltaw.errors import TargetError

    with pytest.raises(TargetError, match="bias"):
        Model(make_net("t5")).attach(BitFit())


# Plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [*CASES, ("masked", "lora")])
def test_the_plan_counts_what_is_trained(kind, name, tmp_path):
    folder = save_base(kind, tmp_path)
    spec = method_for(name, "t5" if kind == "t5" else "bert")
    plain = recipe(folder, kind) | {"adapter": spec.model_dump(mode="json")}
    loaded = load_recipe(plain)
    plan = Planner(loaded, Work.of_rows(3, 9, 0.4)).plan()
    model = load_base(folder, labels=None if kind == "t5" else LABELS)
    model.attach(spec)
    assert plan.counts.trainable == sum(t.numel() for t in model.trainable().values())
    assert plan.growth_bytes > 0


def test_a_plan_refuses_rows_beyond_the_positions(tmp_path):
    loaded = load_recipe(recipe(save_base("bert", tmp_path), "bert"))
    Planner(loaded, Work.of_rows(2, 24)).plan()
    with pytest.raises(BaseError, match="rows of 25 tokens, and this base has 24 positions"):
        Planner(loaded, Work.of_rows(2, 25)).plan()
