"""A tokenizer's kind is read from its structure; what llama.cpp would cut otherwise is refused."""

from __future__ import annotations

import json

import pytest
from made_exports import byte_bpe, sentencepiece_bpe
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.export.vocabulary import vocabulary_of

ROWS = 400


def changed(tokenizer, change):
    """The tokenizer with its JSON changed by `change`."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    change(whole)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(whole)))


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "smaug-bpe", "tekken"])
def test_export_vocabulary_knows_how_text_is_cut(kind):
    words, problems = vocabulary_of(byte_bpe(kind), ROWS, {})
    assert problems == []
    assert (words.model, words.pre, words.scores) == ("gpt2", kind, None)
    assert len(words.tokens) == len(words.types) == ROWS
    assert all(len(merge.split(" ")) == 2 for merge in words.merges)


def test_export_vocabulary_takes_nfc():
    tokenizer = changed(byte_bpe("qwen2"), lambda whole: whole.update(normalizer={"type": "NFC"}))
    assert vocabulary_of(tokenizer, ROWS, {})[1] == []


def one(tokenizer, rows=ROWS):
    words, problems = vocabulary_of(tokenizer, rows, {})
    assert words is None
    return "; ".join(problems)


def test_export_vocabulary_refuses_other_byte_level_structures():
    odd = byte_bpe("gpt-2")
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert "a space in front of every text" in one(odd)
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    assert "name in llama.cpp is not known here" in one(odd)
    merged_with_next = byte_bpe("qwen2")
    change = lambda whole: whole["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")  # noqa: E731
    assert "not known here" in one(changed(merged_with_next, change))
    assert "whole words up" in one(changed(byte_bpe("qwen2"), lambda whole: whole["model"].update(ignore_merges=True)))
    odd = byte_bpe("gpt-2")
    odd.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "normalises text: {'type': 'Lowercase'}" in one(odd)
    assert "dropout to 0.1" in one(changed(byte_bpe(), lambda whole: whole["model"].update(dropout=0.1)))


def test_export_vocabulary_refuses_tokens_that_take_spaces_and_rows_that_are_missing():
    odd = byte_bpe("gpt-2")
    odd.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert "its tokens <mask> take the space beside them" in one(odd)
    n = len(byte_bpe("gpt-2"))
    assert f"token number {n - 1}, its embedding {n - 1} rows" in one(byte_bpe("gpt-2"), n - 1)
    assert vocabulary_of(byte_bpe("gpt-2"), n, {})[1] == []


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_export_vocabulary_refuses_models_that_are_no_bpe(kind):
    model = (
        models.Unigram([("a", 0.0), ("b", -1.0)]) if kind == "Unigram" else models.WordLevel({"a": 0}, unk_token="a")
    )
    assert f"its tokenizer is a {kind} model" in one(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model)))


@pytest.mark.parametrize("prefix", [True, False])
def test_export_vocabulary_turns_ranks_of_merges_into_scores(prefix):
    words, problems = vocabulary_of(sentencepiece_bpe(prefix), ROWS, {})
    assert problems == []
    assert (words.model, words.merges, words.space_prefix) == ("llama", None, prefix)
    scored = sorted((t for t, s in zip(words.tokens, words.scores, strict=True) if s < 0), key=words.tokens.index)
    by_score = sorted(scored, key=lambda t: -words.scores[words.tokens.index(t)])
    assert by_score[:2] == ["\u2581t", "\u2581th"]
    assert words.types[:4] == [2, 3, 3, 6]  # unknown, control, control, byte


def test_export_vocabulary_takes_metaspace_as_sentencepieces_mark():
    tokenizer = sentencepiece_bpe()
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
    for scheme, prefix in (("first", True), ("always", True), ("never", False)):
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
        words, problems = vocabulary_of(tokenizer, ROWS, {})
        assert (problems, words.space_prefix) == ([], prefix)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=True)
    assert "cuts text" in one(tokenizer)


def test_export_vocabulary_refuses_merges_that_no_scores_order():
    def swap(whole):  # one token's two merges now stand apart
        merges = whole["model"]["merges"]
        merges.remove(["\u2581t", "he"])
        merges.append(["\u2581t", "he"])

    assert "not in the order of any scores" in one(changed(sentencepiece_bpe(), swap))
    found_first = sentencepiece_bpe()
    found_first.add_tokens(["\u2581the"])
    assert vocabulary_of(changed(found_first, swap), ROWS, {})[1] == []

    def drop(whole):  # SentencePiece would merge this pair, the tokenizer does not
        whole["model"]["merges"].remove(["\u2581th", "e"])

    assert "not in the order of any scores" in one(changed(sentencepiece_bpe(), drop))
