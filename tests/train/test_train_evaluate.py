"""Evaluation and greedy generation against references that take one row at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_runs import ROWS, plain_transformers, recipe, run
from torch import nn

from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.task import read_labels
from deltaw.data.template import encode, prompt_ids
from deltaw.errors import DataError, RecipeError
from deltaw.model.base import load_base
from deltaw.model.generate import Sampling, end_tokens, generate
from deltaw.model.model import Model
from deltaw.train.evaluate import check_metric, data_spec, evaluate_rows

SPEC = DataSpec(max_tokens=128)
LABELS = ["yes", "no", "maybe"]


@pytest.fixture(scope="module")
def learned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The base with an adapter that knows some of ROWS and not others: answers are of several lengths."""
    out = tmp_path_factory.mktemp("learned")
    run(recipe(base, train={"steps": 40, "lr": 1e-2}, adapter={"rank": 8, "alpha": 16}), out, rows=ROWS[:6])
    model = load_base(base)
    model.attach(out / "adapter")
    return model


@pytest.fixture(scope="module")
def net(learned: Model, base: Path) -> nn.Module:
    """The same as a plain transformers model: the change written into its weights."""
    net = plain_transformers(base, dtype=torch.float32)
    scale = 16 / 8
    with torch.no_grad():
        for site, params in next(iter(learned.adapters.values())).sites.items():
            net.get_submodule(site).weight += scale * params["B"] @ params["A"]
    return net


def one_by_one(net: nn.Module, prompts: list[list[int]], most: int, end: int) -> list[list[int]]:
    """transformers' own greedy generation, a row at a time, without the end token."""
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        settings = {"do_sample": False, "max_new_tokens": most, "pad_token_id": end, "eos_token_id": end}
        whole = net.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        new = whole[0, len(prompt) :].tolist()
        answers.append(new[: new.index(end)] if end in new else new)
    return answers


def log_likelihood(net: nn.Module, ids: tuple[int, ...], is_target: tuple[bool, ...]) -> float:
    with torch.no_grad():
        scores = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(len(ids)) if is_target[i])


def texts_one_by_one(model: Model, net: nn.Module, rows: list[dict], most: int) -> list[str]:
    prompts = [prompt_ids(row, model.tokenizer, SPEC) for row in read_rows(rows)]
    answers = one_by_one(net, prompts, most, model.tokenizer.eos_token_id)
    return [model.tokenizer.decode(a, skip_special_tokens=True).strip() for a in answers]


# Generation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_batches_are_transformers_one_at_a_time(learned: Model, net: nn.Module, batch_size: int) -> None:
    rows = [*ROWS, {"prompt": "a much longer prompt than all the others, so that padding shows", "completion": ""}]
    prompts = [prompt_ids(row, learned.tokenizer, SPEC) for row in read_rows(rows)]
    wanted = one_by_one(net, prompts, 9, learned.tokenizer.eos_token_id)
    lengths = {len(a) for a in wanted}
    assert len(lengths) >= 3, f"rows must leave the batch at several times to test that; lengths {lengths}"
    assert generate(learned, prompts, 9, batch_size=batch_size) == wanted


def test_a_row_given_up_leaves_and_the_others_go_on_as_before(learned: Model) -> None:
    prompts = [prompt_ids(row, learned.tokenizer, SPEC) for row in read_rows(ROWS)]
    whole = generate(learned, prompts, 8)
    cut = generate(learned, prompts, 8, give_up=lambda i, tokens: i % 3 == 0 and len(tokens) == 2)
    assert cut == [answer[:2] if i % 3 == 0 else answer for i, answer in enumerate(whole)]


def test_generation_stops_at_every_end_token_and_at_the_limit(learned: Model) -> None:
    prompts = [prompt_ids(read_rows(ROWS)[0], learned.tokenizer, SPEC)]
    whole = generate(learned, prompts, 6)[0]
    assert end_tokens(learned) == {0}
    assert [len(generate(learned, prompts, n)[0]) for n in (1, 2)] == [1, 2]
    before = learned.net.generation_config.eos_token_id
    learned.net.generation_config.eos_token_id = [0, whole[1]]
    try:
        assert generate(learned, prompts, 6)[0] == whole[:1]
    finally:
        learned.net.generation_config.eos_token_id = before


def test_sampling_is_a_function_of_its_seed_and_greedy_in_the_limits(learned: Model) -> None:
    prompts = [prompt_ids(row, learned.tokenizer, SPEC) for row in read_rows(ROWS)]
    hot = [generate(learned, prompts, 6, sampling=Sampling(3.0, 1.0, seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    greedy = generate(learned, prompts, 6)
    assert generate(learned, prompts, 6, sampling=Sampling(3.0, 1e-9, 1)) == greedy
    assert generate(learned, prompts, 6, sampling=Sampling(1e-4, 1.0, 1)) == greedy


def test_no_prompts_give_no_answers(learned: Model) -> None:
    assert generate(learned, [], 5) == []


# exact and json -------------------------------------------------------------------------------------


def test_exact_is_the_share_of_equal_answers_with_and_without_giving_up(learned: Model, net: nn.Module) -> None:
    answers = texts_one_by_one(learned, net, ROWS, 13)
    right = [a == row["completion"] for a, row in zip(answers, ROWS, strict=True)]
    assert 0 < sum(right) < len(right), "the adapter should know some rows and not others"
    rows = read_rows(ROWS)
    told = evaluate_rows(learned, rows, "exact", SPEC, predictions=True)
    assert [(p["answer"], p["wanted"], p["right"]) for p in told["predictions"]] == [
        (a, row["completion"], ok) for a, row, ok in zip(answers, ROWS, right, strict=True)
    ]
    quick = evaluate_rows(learned, rows, "exact", SPEC)
    assert quick["value"] == told["value"] == sum(right) / len(right)
    assert (quick["n"], quick["metric"]) == (len(ROWS), "exact")
    assert "predictions" not in quick


def test_exact_ignores_space_around_answers_and_knows_empty_ones(learned: Model) -> None:
    known = next(
        row
        for row, p in zip(
            ROWS, evaluate_rows(learned, read_rows(ROWS), "exact", SPEC, predictions=True)["predictions"],
            strict=True,
        )
        if p["right"]
    )  # fmt: skip
    for completion, value in (("  yes\n", 1.0), ("", 0.0), ("ye", 0.0), ("yes yes", 0.0)):
        text = completion.replace("yes", known["completion"]).replace("ye", known["completion"][:-1])
        row = read_rows([{"prompt": known["prompt"], "completion": text}])
        assert evaluate_rows(learned, row, "exact", SPEC)["value"] == value, repr(text)
        assert evaluate_rows(learned, row, "exact", SPEC, predictions=True)["value"] == value, repr(text)


class Saying(Model):
    """A model whose greedy answers are given texts: the next letter of the text that goes with the prompt."""

    device = torch.device("cpu")

    def __init__(self, inner: Model, says: dict[str, str]) -> None:
        super().__init__(inner.net, inner.tokenizer)
        tokenizer, end = inner.tokenizer, inner.tokenizer.eos_token_id
        self.rows = {tuple(tokenizer(p)["input_ids"]): [*tokenizer(" " + a)["input_ids"], end] for p, a in says.items()}
        self.net = self  # generate() calls model.net(...)
        self.config, self.generation_config = inner.net.config, inner.net.generation_config
        self.get_input_embeddings, self.modules = inner.net.get_input_embeddings, inner.net.modules

    def __call__(self, input_ids, attention_mask, past_key_values, **ignored):
        logits = torch.zeros(len(input_ids), 1, 300)
        if not hasattr(past_key_values, "written"):
            past_key_values.written = [[] for _ in input_ids]
            past_key_values.batch_select_indices = lambda index: setattr(
                past_key_values, "written", [past_key_values.written[i] for i in index.tolist()]
            )
        for r, ids in enumerate(input_ids):
            real = ids[attention_mask[r, -len(ids) :].bool()].tolist()
            past_key_values.written[r] += real
            seen = past_key_values.written[r]
            answer = next((a, len(p)) for p, a in self.rows.items() if tuple(seen[: len(p)]) == p)
            logits[r, 0, answer[0][len(seen) - answer[1]]] = 1
        return type("Out", (), {"logits": logits})


@pytest.fixture
def saying(base: Path):
    return lambda says: Saying(load_base(base), says)


def test_json_compares_values_not_text(saying) -> None:
    pairs = [
        ('{"a": 1, "b": [2, null]}', '{"b":[2,null],"a":1.0}', True),
        ('{"a": 1}', '{"a": 2}', False),
        ('"x"', '"x"', True),
        ("null", "null", True),
        ("null", "nothing", False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1}', '{"a": 1', False),
        ('{"a": "\u00e9"}', '{"a": "\\u00e9"}', True),
        ("true", "1", False),
        ('{"a": 0}', '{"a": false}', False),
        ("[[]]", "[" * 1100, False),
    ]
    rows = [{"prompt": f"question {chr(97 + i)}", "completion": want} for i, (want, _, _) in enumerate(pairs)]
    model = saying({f"question {chr(97 + i)}": said for i, (_, said, _) in enumerate(pairs)})
    told = evaluate_rows(model, read_rows(rows), "json", SPEC, predictions=True, max_new_tokens=1200)
    assert [p["answer"] for p in told["predictions"]] == [said for _, said, _ in pairs]
    assert [p["right"] for p in told["predictions"]] == [ok for _, _, ok in pairs]
    assert told["value"] == sum(ok for _, _, ok in pairs) / len(pairs)


def test_giving_up_never_gives_up_an_answer_that_comes_right(saying) -> None:
    says = {
        "one": "caf\u00e9 au lait",  # a character of two tokens
        "two": "a\U0001f600b",  # of four
        "three": " spaces before and after  ",
        "four": "right and then more",
        "five": "wrong",
        "six": "",
    }
    wanted = {**says, "three": "spaces before and after", "four": "right", "five": "right"}
    rows = read_rows([{"prompt": p, "completion": c} for p, c in wanted.items()])
    told = evaluate_rows(saying(says), rows, "exact", SPEC, predictions=True)
    quick = evaluate_rows(saying(says), rows, "exact", SPEC)
    assert [p["right"] for p in told["predictions"]] == [True, True, True, False, False, True]
    assert quick["value"] == told["value"] == 4 / 6


def test_json_needs_completions_that_are_json(learned: Model) -> None:
    rows = read_rows([{"prompt": "a", "completion": "{}"}, {"prompt": "b", "completion": "{oops"}])
    with pytest.raises(DataError, match="rows line 2: the completion is no JSON"):
        evaluate_rows(learned, rows, "json", SPEC)


# choice and perplexity ------------------------------------------------------------------------------


def test_choice_picks_the_likeliest_label_by_its_summed_log_likelihood(learned: Model, net: nn.Module) -> None:
    answers = []
    for row in ROWS:
        scores = []
        for label in LABELS:
            example = encode(read_rows([{**row, "completion": label}])[0], learned.tokenizer, SPEC)
            scores.append(log_likelihood(net, example.input_ids, example.is_target))
        answers.append(LABELS[scores.index(max(scores))])
    result = evaluate_rows(learned, read_rows(ROWS), "choice", SPEC, labels=LABELS, predictions=True)
    assert [p["answer"] for p in result["predictions"]] == answers
    right = [a == row["completion"] for a, row in zip(answers, ROWS, strict=True)]
    assert result["value"] == sum(right) / len(ROWS)
    assert result["n"] == len(ROWS)
    assert len(set(answers)) > 1


def test_choice_takes_each_row_s_own_choices(learned: Model) -> None:
    rows = read_rows([{**row, "choices": LABELS} for row in ROWS])
    own = evaluate_rows(learned, rows, "choice", SPEC)
    shared = evaluate_rows(learned, read_rows(ROWS), "choice", SPEC, labels=LABELS)
    assert own["value"] == shared["value"]


@pytest.mark.parametrize(
    ("row", "labels", "said"),
    [
        ({"prompt": "a", "completion": "perhaps"}, LABELS, "rows line 1: completion 'perhaps' is none of"),
        ({"prompt": "a", "completion": "yes"}, None, "rows line 1: metric 'choice' needs --labels"),
        ({"text": "a yes"}, LABELS, "rows line 1: metric 'choice' needs prompt/completion rows"),
    ],
)
def test_choice_refuses_rows_it_cannot_judge(learned: Model, row: dict, labels, said: str) -> None:
    with pytest.raises(DataError, match=said):
        evaluate_rows(learned, read_rows([row]), "choice", SPEC, labels=labels)


def test_choice_never_cuts_a_label_to_fit(learned: Model) -> None:
    with pytest.raises(DataError, match="max_tokens is 8"):
        evaluate_rows(learned, read_rows(ROWS[:1]), "choice", DataSpec(max_tokens=8), labels=LABELS)


def test_perplexity_is_plain_transformers_over_all_targets(learned: Model, net: nn.Module) -> None:
    rows = [*ROWS, {"text": "some plain text, and a longer one too"}]
    total, n = 0.0, 0
    for row in read_rows(rows):
        example = encode(row, learned.tokenizer, SPEC)
        ids = torch.tensor([example.input_ids])
        at = torch.tensor(example.is_target).nonzero().flatten()
        with torch.no_grad():
            logits = net(ids).logits[0].double()
        total += float(F.cross_entropy(logits[at - 1], ids[0, at], reduction="sum"))
        n += len(at)
    result = evaluate_rows(learned, read_rows(rows), "perplexity", SPEC)
    # the adapter's change is summed apart there and written into float32 weights here
    assert result["value"] == pytest.approx(math.exp(total / n), rel=1e-5)
    assert (result["n"], result["target_tokens"], result["rows_cut"]) == (len(rows), n, 0)


def test_perplexity_counts_the_rows_it_cut(learned: Model) -> None:
    rows = read_rows([{"text": "x" * 30}, {"text": "short"}])
    assert evaluate_rows(learned, rows, "perplexity", DataSpec(max_tokens=10))["rows_cut"] == 1


# Refusals -------------------------------------------------------------------------------------------


def test_an_unknown_metric_is_refused_with_the_near_one(learned: Model) -> None:
    with pytest.raises(RecipeError, match=r"Unknown metric 'exakt'. Did you mean 'exact'"):
        check_metric("exakt")
    with pytest.raises(RecipeError, match="Known: exact, json, choice, perplexity"):
        evaluate_rows(learned, read_rows(ROWS), "bleu", SPEC)


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}


@pytest.mark.parametrize(
    "row", [{"text": "no answer"}, {"messages": [{"role": "user", "content": "hi"}]}, {"messages": [CALL]}]
)
def test_rows_without_an_answer_cannot_be_compared(learned: Model, row: dict) -> None:
    with pytest.raises(DataError, match="rows line 1"):
        evaluate_rows(learned, read_rows([row]), "exact", SPEC)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["yes", "no"', "cannot be read as JSON"),
        ('{"a": 1}', "list of at least two strings"),
        ('["yes"]', "list of at least two strings"),
        ('["yes", 2]', "list of at least two strings"),
        ('["yes", ""]', "list of at least two strings"),
        ('["yes", "yes"]', "holds a label twice"),
        ("", "cannot be read as JSON"),
    ],
)
def test_a_bad_labels_file_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_labels(path)
    assert str(path) in str(caught.value)


def test_a_missing_labels_file_is_refused_and_a_good_one_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.json"):
        read_labels(tmp_path / "absent.json")
    (tmp_path / "latin.json").write_bytes('["\xe9t\xe9", "b"]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin.json"):
        read_labels(tmp_path / "latin.json")
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    assert read_labels(tmp_path / "labels.json") == LABELS


def test_rows_are_written_as_the_adapter_in_use_was_trained(base: Path, tmp_path: Path) -> None:
    plain = recipe(base, data={"separator": " => ", "append_end": False}, train={"steps": 1})
    run(plain, tmp_path / "run")
    model = load_base(base)
    assert data_spec(model, None, 99) == DataSpec(max_tokens=99)
    model.attach(tmp_path / "run" / "adapter")
    assert data_spec(model, None, 99) == DataSpec(max_tokens=99, separator=" => ", append_end=False)
    assert data_spec(model, "chat", 99).template == "chat"
    with pytest.raises(RecipeError, match="plain or chat"):
        data_spec(model, "alpaca", 99)
