"""The commands work on encoders and encoder-decoders as on causal models; labels come from the adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from made_kinds import LABELS, answered, labelled, save_base
from transformers import AutoModelForSequenceClassification


@pytest.fixture
def deltaw(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """deltaw("eval", "--base", folder, ...) as from a terminal: (exit code, stdout, stderr)."""
    from deltaw.cli.main import main

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deltaw", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return call


def write(folder: Path, kind: str, **train: object) -> Path:
    """A base, rows and a recipe in `folder`."""
    save_base(kind, folder / "base")
    rows = answered() if kind == "t5" else labelled()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "labels.json").write_text(json.dumps(LABELS))
    labels = {} if kind == "t5" else {"labels": "labels.json"}
    recipe = {
        "base": {"path": "base", "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 8, "alpha": 16},
        "data": {"train": "rows.jsonl", "valid": "rows.jsonl", **labels},
        "train": {"steps": 60, "tokens_per_step": 60, "lr": 0.02, **train},
        "eval": {"metric": "exact", "every_steps": 30},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return folder / "recipe.yaml"


@pytest.mark.parametrize("kind", ["encoder", "t5"])
def test_train_eval_generate_merge_and_inspect(kind, deltaw, tmp_path):
    recipe, run, base = write(tmp_path, kind), tmp_path / "run", tmp_path / "base"
    code, out, _ = deltaw("train", recipe, "--out", run, "--json")
    assert code == 0
    best = json.loads(out.splitlines()[-1])["best"]
    assert best > 0.6
    given = ("--base", base, "--dtype", "float32", "--adapter", run)
    code, out, err = deltaw("eval", *given, "--data", tmp_path / "rows.jsonl", "--metric", "exact", "--json")
    assert (code, json.loads(out)["value"], err) == (0, best, "")
    prompt = labelled()[1]["prompt"]
    code, out, _ = deltaw("generate", *given, prompt, "--json")
    found = json.loads(out)
    answers = LABELS if kind == "encoder" else [row["completion"] for row in answered()]
    assert found["text"] in answers
    if kind == "encoder":
        assert sorted(found["labels"]) == LABELS
        assert found["text"] == max(found["labels"], key=found["labels"].get)
        assert sum(found["labels"].values()) == pytest.approx(1)
    code, out, _ = deltaw("merge", "--base", base, "--adapter", run, "--out", tmp_path / "merged")
    assert code == 0
    assert ("same label" in out) == (kind == "encoder")
    given = ("--base", tmp_path / "merged", "--dtype", "float32")
    code, out, _ = deltaw("eval", *given, "--data", tmp_path / "rows.jsonl", "--metric", "exact", "--json")
    assert json.loads(out)["value"] == best
    code, out, _ = deltaw("inspect", tmp_path / "merged", "--json")
    assert json.loads(out)["task"] == ("classify" if kind == "encoder" else "seq2seq")
    if kind == "encoder":
        net = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
        assert list(net.config.id2label.values()) == LABELS


def test_an_encoder_says_what_is_missing(deltaw, tmp_path):
    write(tmp_path, "masked")
    given = ("--base", tmp_path / "base", "--data", tmp_path / "rows.jsonl", "--metric", "exact")
    code, out, err = deltaw("eval", *given)
    assert (code, out) == (2, "")
    assert "masked language model (BertForMaskedLM)" in err
    assert "Give labels" in err
    code, _, err = deltaw("eval", *given, "--labels", tmp_path / "labels.json")
    assert code == 2
    assert "fresh and has learned nothing" in err
    code, _, err = deltaw("train", tmp_path / "recipe.yaml", "data.labels=null", "--out", tmp_path / "run")
    assert code == 2
    assert "data.labels in a recipe" in err
    assert not (tmp_path / "run" / "run.json").exists()


def test_plan_and_data_show(deltaw, tmp_path):
    recipe = write(tmp_path, "masked")
    code, out, _ = deltaw("plan", recipe, "--json")
    assert code == 0
    settings = json.loads(out)["settings"]
    assert settings["target_tokens"] == settings["rows"] > 1
    code, out, _ = deltaw("data", "show", recipe, "--limit", 1)
    assert code == 0
    assert "[SEP][[noun.body]]" in out
    code, _, err = deltaw("plan", "--base", tmp_path / "base", "--length", 10)
    assert code == 2
    assert "Give labels" in err
    code, out, _ = deltaw("plan", "--base", tmp_path / "base", "--length", 10, "data.labels=[a, b]", "--json")
    assert code == 0


def test_a_budget_is_kept(deltaw, tmp_path):
    for kind in ("encoder", "t5"):
        (tmp_path / kind).mkdir()
        recipe = write(tmp_path / kind, kind, steps=2)
        code, out, err = deltaw("train", recipe, "budget.memory_gb=4", "--out", tmp_path / kind / "run", "--json")
        assert code == 0, err
        assert json.loads(out.splitlines()[0])["event"] == "planned"
