"""What `deltaw data show` and its numbers say."""

from __future__ import annotations

import json
import sys
import types

import pytest
from made_tokenizers import make_words
from typer.testing import CliRunner

import deltaw.data
from deltaw.cli.data import app
from deltaw.data import DataSpec, Encoded, Example, Row, encode, encode_all, length_statistics, marked
from deltaw.data.task import CAUSAL
from deltaw.errors import DataError


def of_lengths(*lengths: int) -> Encoded:
    examples = [Example((1,) * n, (False,) * n, "rows line 1") for n in lengths]
    return Encoded(examples, n_rows=len(lengths) + 2, n_cut=1, n_skipped=2, n_tokens=sum(lengths), n_targets=5)


def test_statistics_of_ten_lengths():
    assert length_statistics(of_lengths(10, 1, 9, 2, 8, 3, 7, 4, 6, 50)) == {
        "n": 10,
        "min": 1,
        "median": 6.5,
        "p90": 10,
        "max": 50,
        "mean": 10.0,
        "tokens": 100,
        "targets": 5,
        "cut": 1,
        "skipped": 2,
    }


def test_statistics_of_one_length():
    assert [length_statistics(of_lengths(4))[key] for key in ("n", "min", "median", "p90", "max", "mean")] == [
        1,
        4,
        4,
        4,
        4,
        4,
    ]


def test_marked_pieces_join_to_the_whole_text(words):
    example = encode(Row(prompt="Q: one", completion="yes no"), words, DataSpec())
    assert marked(example, words) == [("Q: one", False), (" yes no</s>", True)]


def test_a_character_over_a_border_is_shown_whole(bpe):
    ids = bpe("a\U0001f642b")["input_ids"]
    assert len(ids) == 6  # four bytes of the face
    split = Example(tuple(ids), (False, False, False, True, True, True), "rows line 1")
    assert marked(split, bpe) == [("a", False), ("\U0001f642b", True)]
    ended = Example(tuple(ids[:3]), (False, False, True), "rows line 1")
    assert "".join(text for text, _ in marked(ended, bpe)) == bpe.decode(ids[:3])


def test_the_space_of_a_pieces_first_word_is_shown():
    """Decoders like Llama 2's drop the space of the first word they are given."""
    from tokenizers import decoders

    tokenizer = make_words()
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    example = encode(Row(prompt="Q: one", completion="yes"), tokenizer, DataSpec())
    assert tokenizer.decode([9]) == "yes"
    assert marked(example, tokenizer) == [("Q: one", False), (" yes</s>", True)]


def test_the_names_of_the_room_are_its_public_names():
    assert deltaw.data.__all__ == sorted(deltaw.data.__all__)
    assert all(getattr(deltaw.data, name).__doc__ for name in deltaw.data.__all__)


@pytest.fixture
def recipe(monkeypatch, tmp_path, words):
    """A recipe over two rows; the overrides and the base that were asked for are kept in the list."""
    rows = [{"prompt": "Q: one", "completion": "[b]"}, {"prompt": "Q:", "completion": "yes"}] * 2
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    asked = []

    def load_recipe(name, overrides):
        asked.append((name, overrides))
        return types.SimpleNamespace(base=types.SimpleNamespace(path="starter"), data=DataSpec(train=str(path)))

    def load_tokenizer(name):
        asked.append(name)
        return words

    monkeypatch.setitem(sys.modules, "deltaw.train.recipe", types.SimpleNamespace(load_recipe=load_recipe))
    monkeypatch.setitem(sys.modules, "deltaw.model.load", types.SimpleNamespace(load_tokenizer=load_tokenizer))
    base = types.SimpleNamespace(task_before=lambda path, labels: CAUSAL)
    monkeypatch.setitem(sys.modules, "deltaw.model.base", base)
    return path, asked


def test_show_marks_targets_without_colour(recipe):
    path, asked = recipe
    result = CliRunner().invoke(app, ["show", "r.yaml", "data.max_tokens=9", "--limit", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    assert asked == [("r.yaml", ["data.max_tokens=9"]), "starter"]
    assert f"{path} line 1 (4 tokens, 2 targets)" in result.stdout
    assert "Q: one[[<unk></s>]]" in result.stdout
    assert "Q:[[ yes</s>]]" in result.stdout
    assert "line 3" not in result.stdout
    for name in ("n", "min", "median", "p90", "max", "mean", "targets", "cut", "skipped"):
        assert name in result.stdout


def test_show_as_json_is_one_object(recipe):
    path, _ = recipe
    result = CliRunner().invoke(app, ["show", "r.yaml", "--json", "--limit", "1"], catch_exceptions=False)
    assert json.loads(result.stdout) == {
        "split": "train",
        "source": str(path),
        "rows": [
            {
                "where": f"{path} line 1",
                "tokens": 4,
                "targets": 2,
                "cut": False,
                "pieces": [{"text": "Q: one", "target": False}, {"text": "<unk></s>", "target": True}],
            }
        ],
        "statistics": {
            "n": 4,
            "min": 3,
            "median": 3.5,
            "p90": 4,
            "max": 4,
            "mean": 3.5,
            "tokens": 14,
            "targets": 8,
            "cut": 0,
            "skipped": 0,
        },
    }


def test_show_refuses_a_split_that_the_recipe_lacks(recipe):
    with pytest.raises(DataError, match=r"names no data\.valid"):
        CliRunner().invoke(app, ["show", "r.yaml", "--split", "valid"], catch_exceptions=False)
    assert CliRunner().invoke(app, ["show", "r.yaml", "--split", "test"]).exit_code == 2


def test_statistics_agree_with_what_was_encoded(words):
    rows = [Row(prompt="Q: one two", completion="yes"), Row(prompt="Q:", completion="yes")]
    encoded = encode_all(rows, words, DataSpec(max_tokens=4))
    statistics = length_statistics(encoded)
    assert (statistics["tokens"], statistics["targets"], statistics["cut"]) == (7, 3, 1)
