"""Rows are read whole or refused with the place and the reason."""

from __future__ import annotations

import hashlib
import json
import sys
import types

import pytest
from made_tokenizers import SHIPPED, shipped

from deltaw.data import Row, data_hash, read_rows
from deltaw.errors import BadInput, DataError

GOOD = '{"prompt": "a", "completion": "b"}'
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def refusal(source) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


def written(tmp_path, text: str | bytes, name: str = "train.jsonl"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_three_shapes_are_read_with_their_lines_and_extra_keys_are_ignored(tmp_path):
    lines = [
        json.dumps({"prompt": "p", "completion": "c", "answer": 3, "choices": ["c", "d"]}),
        "",
        json.dumps({"messages": CHAT, "prompt": "p", "text": None}),
        json.dumps({"text": "t\u2028u"}, ensure_ascii=False),
    ]
    path = written(tmp_path, "\r\n".join(lines))
    assert read_rows(path) == [
        Row(prompt="p", completion="c", choices=("c", "d"), source=str(path), line=1),
        Row(messages=CHAT, source=str(path), line=3),
        Row(text="t\u2028u", source=str(path), line=4),
    ]
    assert read_rows(str(path))[1].where == f"{path} line 3"


def test_rows_in_memory_are_counted_from_one():
    rows = read_rows(iter([{"text": "a"}, {"text": "b"}]))
    assert [row.where for row in rows] == ["rows line 1", "rows line 2"]
    assert [row.text for row in rows] == ["a", "b"]


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    assert read_rows(written(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()))[0].prompt == "a"


@pytest.mark.parametrize("content", ["", "\n \n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = written(tmp_path, content)
    assert f"{path} has no rows" in refusal(path)


def test_an_empty_list_is_refused():
    assert "rows has no rows" in refusal([])


def test_a_missing_file_is_refused_with_the_near_name(tmp_path):
    written(tmp_path, GOOD)
    message = refusal(tmp_path / "trian.jsonl")
    assert "trian.jsonl' does not exist" in message
    assert "Did you mean 'train.jsonl'?" in message
    assert "does not exist" in refusal(tmp_path / "no" / "such" / "folder.jsonl")


def test_a_folder_is_refused(tmp_path):
    assert f"{str(tmp_path)!r} cannot be read: " in refusal(tmp_path)


def test_bad_json_on_line_412_is_named_with_the_message_and_column(tmp_path):
    bad = '{"prompt": "a" "completion": "b"}'
    path = written(tmp_path, "\n".join([GOOD] * 411 + [bad] + [GOOD] * 3))
    message = refusal(path)
    assert f"{path} line 412: bad JSON: Expecting ',' delimiter at column 16" in message
    assert '"completion"' in message
    assert "each line must be one json object" in message.lower()


@pytest.mark.parametrize("line", ["[" * 100_000, '{"prompt": ' + "9" * 5000 + "}", "{} {}", "{"])
def test_any_other_bad_json_is_a_data_error(tmp_path, line):
    assert "line 2: bad JSON" in refusal(written(tmp_path, f"{GOOD}\n{line}"))


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    message = refusal(written(tmp_path, GOOD.encode() + b'\n{"text": "caf\xe9"}'))
    assert "line 2: not UTF-8: 0xe9 at byte 14" in message


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a"}, "field 'completion' is missing.\n  The row has 'prompt'."),
        ({"completion": "a"}, "field 'prompt' is missing"),
        ({"prompt": "a", "completions": "b"}, "'prompt', 'completions'. Did you mean 'completions'?"),
        ({"prompt": "a", "completion": None}, "field 'completion' is null.\n  The row has 'prompt', 'completion'."),
        ({"txt": "a"}, "The row has 'txt'. Did you mean 'txt'? (for 'text')"),
        ({}, "The row has no fields."),
        ({"text": None}, "no 'text' ('text' is null)"),
        ({"prompt": "a", "completion": 7}, "field 'completion' must be text, found int 7"),
        ({"prompt": [{"role": "user"}], "completion": "b"}, "turns of a chat go into 'messages'"),
        ({"text": "half \ud83d"}, "field 'text' holds a lone surrogate, '\\ud83d', at index 5"),
        (
            {"prompt": "a", "completion": "b", "text": "c"},
            "more than one shape: 'prompt', 'completion' and 'text'",
        ),
        ({"messages": CHAT, "text": "c"}, "more than one shape: 'messages' and 'text'"),
        ({"messages": []}, "'messages' must be a list of turns, found list []"),
        ({"messages": "hi"}, "'messages' must be a list of turns, found str 'hi'"),
        ({"messages": ["hi"]}, "messages[0] must be an object, found str 'hi'"),
        ({"messages": [{"role": "user"}]}, "messages[0] has no 'content'.\n  It has 'role'."),
        (
            {"messages": [*CHAT, {"from": "user", "content": "a"}]},
            "messages[2] has no 'role'.\n  It has 'from'",
        ),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0]['content'] must be text, found int 3"),
        ("a", "a row must be an object, found str 'a'"),
        ([1, 2], "a row must be an object, found list [1, 2]"),
    ],
)
def test_a_row_that_says_nothing_usable_is_refused_with_its_line(tmp_path, record, said):
    message = refusal(written(tmp_path, f"{GOOD}\n{json.dumps(record)}\n"))
    assert "line 2: " in message
    assert said in message
    assert "Did you mean 'completion'" not in message or "completion" not in record
    assert "rows line 2: " in refusal([json.loads(GOOD), record])


def test_a_turn_that_calls_tools_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    kept = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    assert read_rows([{"messages": [CHAT[0], call]}])[0].messages == [CHAT[0], kept]


@pytest.mark.parametrize("source", [None, 3, {"text": "one row, not a list"}])
def test_what_is_neither_a_path_nor_rows_is_refused(source):
    assert f"found {type(source).__name__}" in refusal(source)


def test_the_hash_is_of_the_contents_in_order_and_not_of_the_place(tmp_path):
    records = [{"prompt": "p", "completion": "\u00e9", "extra": 1}, {"text": "t"}, {"messages": CHAT}]
    rows = read_rows(records)
    canonical = (
        '{"completion":"\\u00e9","prompt":"p"}\n{"text":"t"}\n'
        '{"messages":[{"content":"hi","role":"user"},{"content":"yes","role":"assistant"}]}\n'
    )
    assert data_hash(rows) == hashlib.sha256(canonical.encode()).hexdigest()
    path = written(tmp_path, "\n\n".join(json.dumps(record) for record in records))
    assert data_hash(read_rows(path)) == data_hash(rows)
    assert data_hash(rows[::-1]) != data_hash(rows)
    assert data_hash(rows[:2]) != data_hash(rows)


def test_an_unmet_extra_is_named_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for source in ("hf:org/name:test", "rows.parquet", "rows.csv", "rows.json"):
        message = refusal(source)
        assert repr(source) in message
        assert "pip install 'deltaw[datasets]'" in message


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:org/name", ("org/name", {"split": "train"})),
        ("hf:org/name:test[:2]", ("org/name", {"split": "test[:2]"})),
        ("d/rows.parquet", ("parquet", {"split": "train", "data_files": "d/rows.parquet"})),
        ("hf:d/rows.csv", ("csv", {"split": "train", "data_files": "d/rows.csv"})),
    ],
)
def test_data_sets_are_read_through_datasets(monkeypatch, source, asked):
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        return [{"text": "a", "prompt": None, "completion": None}, {"text": "b", "prompt": None}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_rows(source) == [Row(text="a", source=source, line=1), Row(text="b", source=source, line=2)]
    assert calls == [asked]


def test_a_data_set_that_cannot_be_read_is_a_data_error(monkeypatch):
    def load_dataset(name, **options):
        raise FileNotFoundError("no such data set")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert "(split 'train'): FileNotFoundError: no such data set" in refusal("hf:org/name")


def test_a_data_error_is_bad_input():
    assert issubclass(DataError, BadInput)
    assert DataError.exit_code == 2


def test_the_shipped_data_sets_are_whole_and_licensed():
    counts = {}
    for folder in sorted(SHIPPED.iterdir()):
        assert (folder / "LICENSE.txt").read_text("utf-8").startswith("Source:")
        for split in {"ppl": ("wiki", "austen"), "general_mcq": ("questions",)}.get(
            folder.name, ("train", "valid", "test")
        ):
            rows = read_rows(folder / f"{split}.jsonl")
            assert [(row.prompt, row.completion) for row in rows] == [
                (row["prompt"], row["completion"]) for row in shipped(folder.name, split)
            ]
            counts[folder.name, split] = len(rows)
    assert counts == {
        ("address_json", "train"): 910,
        ("address_json", "valid"): 99,
        ("address_json", "test"): 200,
        ("supersense", "train"): 3599,
        ("supersense", "valid"): 299,
        ("supersense", "test"): 600,
        ("general_mcq", "questions"): 217,
        ("ppl", "wiki"): 24,
        ("ppl", "austen"): 11,
    }


def test_choices_of_a_row_are_kept_and_count_as_data():
    row = {"prompt": "p", "completion": "a", "choices": ["a", "b"]}
    (kept,) = read_rows([row])
    assert kept.choices == ("a", "b")
    assert data_hash([kept]) != data_hash(read_rows([{**row, "choices": ["a", "c"]}]))
    assert read_rows([{**row, "choices": {"text": ["a"]}}])[0].choices is None


def test_a_name_that_is_only_somewhat_near_is_no_hint():
    assert refusal([{"conversations": []}]).endswith("The row has 'conversations'.")


def test_tools_of_a_chat_are_kept_and_count_as_data():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    kept = read_rows([{"messages": turns, "tools": given} for given in (tools, json.dumps(tools), [], "", None)])
    assert [row.tools for row in kept] == [tools, tools, None, None, None]
    assert data_hash(kept[:1]) != data_hash(kept[2:3])
    assert read_rows([{"text": "a", "tools": "of another tool"}])[0].tools is None
    for wrong, said in (("f", "field 'tools': bad JSON"), (["f"], "field 'tools' must be a list of objects")):
        assert said in refusal([{"messages": turns, "tools": wrong}])
