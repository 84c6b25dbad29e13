"""`deltaw eval`, `generate` and `fetch`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ended import Call, Ended, refused

from deltaw import __version__
from deltaw.data.source import read_rows
from deltaw.data.spec import DataSpec
from deltaw.data.template import prompt_ids
from deltaw.model.base import load_base
from deltaw.model.generate import generate
from deltaw.train.evaluate import evaluate_rows
from train.tiny_runs import CHATML, ROWS, save_base, write_rows


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels.json").write_text('["yes", "no", "maybe"]')
    return tmp_path / "labels.json"


@pytest.mark.parametrize("metric", ["exact", "choice", "perplexity"])
def test_eval_is_what_the_library_says(
    deltaw: Call, base: Path, trained: Path, rows: Path, labels: Path, metric: str
) -> None:
    command = ["eval", "--base", base, "--data", rows, "--metric", metric, "--dtype", "float32", "--labels", labels]
    model = load_base(base)
    values = []
    for adapter in ([], ["--adapter", trained]):
        if adapter:
            model.attach(trained)
        ended = deltaw(*command, *adapter, "--json")
        assert ended.code == 0
        wanted = evaluate_rows(model, read_rows(rows), metric, DataSpec(max_tokens=2048), labels=["yes", "no", "maybe"])
        told = ended.json
        assert {k: told[k] for k in wanted if k != "seconds"} == {k: v for k, v in wanted.items() if k != "seconds"}
        assert (told["base"], told["adapter"]) == (str(base), str(trained) if adapter else None)
        values.append(told["value"])
    assert values[0] != values[1]
    said = deltaw(*command, "--adapter", trained)
    assert said.code == 0
    assert f"{metric} {values[1]:.4f} on {len(ROWS)} rows" in said.out


def test_eval_takes_a_limit_and_writes_predictions(
    deltaw: Call, base: Path, trained: Path, rows: Path, tmp_path: Path
) -> None:
    command = ["eval", "--base", base, "--adapter", trained / "adapter", "--data", rows, "--metric", "exact"]
    ended = deltaw(*command, "--limit", 4, "--predictions", tmp_path / "said.jsonl", "--json")
    assert ended.code == 0
    assert ended.json["n"] == 4
    assert "predictions" not in ended.json
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text("utf-8").splitlines()]
    assert [p["wanted"] for p in said] == [row["completion"] for row in ROWS[:4]]
    assert sum(p["right"] for p in said) / 4 == ended.json["value"]


def test_eval_measures_json(deltaw: Call, base: Path, tmp_path: Path) -> None:
    good = write_rows(tmp_path / "good.jsonl", [{"prompt": "a", "completion": "{}"}])
    ended = deltaw("eval", "--base", base, "--data", good, "--metric", "json", "--json")
    assert (ended.code, ended.json["value"], ended.json["n"]) == (0, 0.0, 1)
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "a", "completion": "{oops"}])
    refused(
        deltaw("eval", "--base", base, "--data", bad, "--metric", "json", "--json"),
        "DataError", "bad.jsonl line 1", "no JSON",
    )  # fmt: skip


def test_eval_refuses_in_one_sentence(deltaw: Call, base: Path, trained: Path, rows: Path, tmp_path: Path) -> None:
    def call(**changes: object) -> Ended:
        options = {"base": base, "data": rows, "metric": "exact", **changes}
        return deltaw("eval", *(x for k, v in options.items() for x in (f"--{k}", v)), "--json")

    refused(call(metric="exakt"), "RecipeError", "Did you mean 'exact'")
    refused(call(data=tmp_path / "row.jsonl"), "DataError", "row.jsonl", "Did you mean 'rows.jsonl'")
    refused(call(base=tmp_path / "nowhere"), "BaseError", "nowhere")
    refused(call(adapter=tmp_path / "nowhere"), "NotFound", "nowhere")
    refused(call(adapter=tmp_path), "AdapterError", "holds no adapter")
    refused(call(metric="choice"), "DataError", "needs --labels")
    refused(call(metric="choice", labels=tmp_path / "absent.json"), "DataError", "absent.json")
    refused(call(template="alpaca"), "RecipeError", "plain or chat")
    refused(call(dtype="float12"), "BaseError", "Did you mean")
    refused(call(predictions=tmp_path / "no" / "such" / "file"), "DataError", "such")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    refused(call(data=empty), "DataError", "empty.jsonl has no rows")


def test_an_adapter_of_another_base_is_refused_unless_allowed(
    deltaw: Call, trained: Path, rows: Path, tmp_path: Path
) -> None:
    other = save_base(tmp_path / "other", seed=1)
    command = ["eval", "--base", other, "--adapter", trained, "--data", rows, "--metric", "perplexity", "--json"]
    refused(deltaw(*command), "BaseMismatch", "weights")
    ended = deltaw(*command, "--allow-other-base")
    assert ended.code == 0
    assert ended.err.startswith("warning: The base differs")
    assert ended.json["n"] == len(ROWS)


def test_generate_answers_as_the_library_does(deltaw: Call, base: Path, trained: Path) -> None:
    model = load_base(base)
    model.attach(trained)
    row = read_rows([{"prompt": ROWS[0]["prompt"], "completion": ""}])[0]
    tokens = generate(model, [prompt_ids(row, model.tokenizer, DataSpec())], 5)[0]
    text = model.tokenizer.decode(tokens)
    command = ["generate", "--base", base, "--adapter", trained, "--max-tokens", 5, "--dtype", "float32"]
    ended = deltaw(*command, ROWS[0]["prompt"])
    assert (ended.code, ended.out) == (0, text.strip() + "\n")
    told = deltaw(*command, "--json", ROWS[0]["prompt"]).json
    assert (told["text"], told["tokens"]) == (text, len(tokens))
    assert told["prompt_tokens"] == len(ROWS[0]["prompt"])


def test_generate_puts_the_prompt_through_the_chat_template(deltaw: Call, base: Path) -> None:
    assert "<|im_start|>" in CHATML
    command = ["generate", "--base", base, "--max-tokens", 2, "--json"]
    plain, chat = deltaw(*command, "hi").json, deltaw(*command, "--chat", "hi").json
    # <|im_start|> user \n hi <|im_end|> \n <|im_start|> assistant \n
    assert (plain["prompt_tokens"], chat["prompt_tokens"]) == (2, 1 + 5 + 2 + 1 + 1 + 1 + 10)


def test_generate_samples_by_its_seed(deltaw: Call, base: Path) -> None:
    command = ["generate", "--base", base, "--max-tokens", 8, "--temperature", 2, "--json", "hi"]
    texts = [deltaw(*command, "--seed", seed).json["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_refuses_in_one_sentence(deltaw: Call, base: Path, tmp_path: Path) -> None:
    refused(deltaw("generate", "--base", tmp_path / "nowhere", "hi"), "BaseError", "nowhere")
    refused(deltaw("generate", "--base", base, "--adapter", tmp_path / "x", "hi"), "NotFound", "x")
    refused(deltaw("generate", "--base", base, ""), "DataError", "prompt is empty")
    assert deltaw("generate", "--base", base, "--max-tokens", 0, "hi").code == 2


def test_fetch_of_a_folder_prints_it(deltaw: Call, base: Path, tmp_path: Path) -> None:
    assert deltaw("fetch", base).out == f"{base.resolve()}\n"
    told = deltaw("fetch", base, "--json").json
    assert told["path"] == str(base.resolve())
    assert told["fingerprint"] == load_base(base).fingerprint.model_dump()
    refused(deltaw("fetch", tmp_path / "nowhere"), "BaseError", "nowhere")
    refused(deltaw("fetch", "smollm2-135m-instrukt"), "BaseError", "Did you mean 'smollm2-135m-instruct'")


def test_the_module_is_the_program_and_says_its_version(deltaw: Call) -> None:
    said = f"deltaw {__version__}\n"
    module = subprocess.run([sys.executable, "-m", "deltaw", "--version"], capture_output=True, text=True, check=True)
    assert (module.stdout, deltaw("--version").out) == (said, said)
    wrong = subprocess.run([sys.executable, "-m", "deltaw", "inspect", "nowhere"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
