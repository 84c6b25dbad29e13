"""Plain rows: which tokens are targets is a matter of characters, found on one tokenization."""

from __future__ import annotations

import random

import pytest
from made_tokenizers import BOS, END, held_bytes, make_words, shipped
from pydantic import ValidationError

from deltaw.data import DataSpec, Example, Row, encode, encode_all, prompt_ids, read_rows
from deltaw.errors import DataError

PLAIN = DataSpec()


def row(prompt: str = "Q: one two", completion: str = "yes") -> Row:
    return Row(prompt=prompt, completion=completion, source="train.jsonl", line=412)


def refusal(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    return str(caught.value)


def test_the_completion_and_the_end_are_targets_even_where_the_end_is_also_the_padding(words):
    assert words.pad_token_id == words.eos_token_id == END
    assert encode(row(), words, PLAIN) == Example(
        input_ids=(3, 4, 5, 9, END),  # "Q:", " one", " two", " yes", "</s>"
        is_target=(False, False, False, True, True),
        where="train.jsonl line 412",
        was_cut=False,
    )


def test_without_an_end_only_the_completion_is_a_target(words):
    example = encode(row(), words, DataSpec(append_end=False))
    assert (example.input_ids, example.is_target) == ((3, 4, 5, 9), (False, False, False, True))


def test_a_text_is_all_targets_but_its_first_token(words):
    example = encode(Row(text="Q: one two"), words, PLAIN)
    assert (example.input_ids, example.is_target) == ((3, 4, 5, END), (False, True, True, True))


def test_an_end_token_inside_a_prompt_is_no_target(words):
    example = encode(row("Q:</s> one"), words, PLAIN)
    assert (example.input_ids, example.is_target) == ((3, END, 4, 9, END), (False, False, False, True, True))


@pytest.mark.parametrize("back", [False, True])
def test_what_the_tokenizer_puts_in_front_is_no_target_and_the_end_comes_once(back):
    words = make_words(front=True, back=back)
    example = encode(row(), words, PLAIN)
    assert example.input_ids == (BOS, 3, 4, 5, 9, END)
    assert example.is_target == (False, False, False, False, True, True)
    example = encode(Row(text="Q: one"), words, PLAIN)
    assert (example.input_ids, example.is_target) == ((BOS, 3, 4, END), (False, True, True, True))
    assert encode(row(), words, DataSpec(append_end=False)).input_ids == (BOS, 3, 4, 5, 9)
    assert prompt_ids(row(), words, PLAIN) == [BOS, 3, 4, 5]


def test_a_tokenizer_that_ends_every_text_by_itself_is_not_ended_twice():
    words = make_words(back=True)
    assert encode(row(), words, PLAIN).input_ids == (3, 4, 5, 9, END)
    assert encode(Row(text=""), make_words(front=True, back=True), PLAIN).input_ids == (BOS, END)


def test_an_empty_completion_has_its_end_as_the_one_target(words):
    example = encode_all([row(completion="")], words, PLAIN).examples[0]
    assert (example.input_ids, example.is_target) == ((3, 4, 5, END), (False, False, False, True))


def test_an_empty_prompt_leaves_the_separator_out(words):
    example = encode(row(prompt="", completion="yes no"), words, PLAIN)
    assert (example.input_ids, example.is_target) == ((11, 10, END), (False, True, True))
    example = encode(row(prompt="", completion="yes no"), make_words(front=True), PLAIN)
    assert (example.input_ids, example.is_target) == ((BOS, 11, 10, END), (False, True, True, True))


def test_the_separator_is_learned_with_the_completion(bpe):
    spec = DataSpec(separator="\n->")
    example = encode(row("Address: one", "yes"), bpe, spec)
    learned = [i for i, flag in zip(example.input_ids, example.is_target, strict=True) if flag]
    assert bpe.decode(learned) == "\n->yes<|im_end|>"


def test_a_token_over_the_border_is_one_token_and_a_target(bpe):
    """Cut in two, "Addr" + "ess" would be other tokens than "Address"."""
    whole = bpe("US address as", add_special_tokens=False)["input_ids"]
    spec = DataSpec(separator="", append_end=False)
    example = encode(row("US addr", "ess as"), bpe, spec)
    assert list(example.input_ids) == whole
    pieces = bpe.convert_ids_to_tokens(whole)
    over = pieces.index("\u0120address")
    assert example.is_target == tuple(i >= over for i in range(len(whole)))
    assert prompt_ids(row("US addr", "ess as"), bpe, spec) == whole[:over]


def slow_flags(tokenizer, prompt: str, ids) -> tuple[bool, ...]:
    """A token is a target if it holds a byte at or after the prompt's last: counted from the tokens alone."""
    border = len(prompt.encode())
    return tuple(i > 0 and end > border for i, (_, end) in enumerate(held_bytes(tokenizer, ids)))


@pytest.mark.parametrize("trim", ["bpe", "trimming_bpe"])
def test_shipped_rows_have_the_targets_that_their_bytes_say(trim, request):
    tokenizer = request.getfixturevalue(trim)
    rows = read_rows(shipped("address_json", "test") + shipped("supersense", "test")[:100])
    encoded = encode_all(rows, tokenizer, PLAIN)
    assert (encoded.n_rows, encoded.n_cut, encoded.n_skipped) == (300, 0, 0)
    assert encoded.n_tokens == sum(encoded.lengths) == sum(len(e.input_ids) for e in encoded.examples)
    assert encoded.n_targets == sum(sum(e.is_target) for e in encoded.examples)
    for example, one in zip(encoded.examples, rows, strict=True):
        assert tokenizer.decode(example.input_ids) == f"{one.prompt} {one.completion}<|im_end|>"
        assert example.is_target == slow_flags(tokenizer, one.prompt, example.input_ids)


@pytest.mark.parametrize("trim", ["bpe", "trimming_bpe"])
def test_any_border_has_the_targets_that_its_bytes_say(trim, request):
    tokenizer = request.getfixturevalue(trim)
    draw = random.Random(5)
    parts = [
        "US",
        " address",
        " ",
        "  ",
        "\n",
        "\n\n",
        ":",
        "\u00e9",
        "\U0001f642",
        '{"',
        "city",
        '": "',
        "\t",
        "<|im_end|>",
        "\u3000",
    ]
    seen = 0
    for _ in range(400):
        prompt, separator, completion = ("".join(draw.choices(parts, k=draw.randint(1, 5))) for _ in range(3))
        spec = DataSpec(separator=separator)
        example = encode(row(prompt, completion), tokenizer, spec)
        assert tokenizer.decode(example.input_ids) == prompt + separator + completion + "<|im_end|>"
        assert example.is_target == slow_flags(tokenizer, prompt, example.input_ids), (
            prompt,
            separator,
            completion,
        )
        start = slow_flags(tokenizer, prompt, example.input_ids).index(True)
        if held_bytes(tokenizer, example.input_ids)[0][1] <= len(prompt.encode()):
            assert tuple(prompt_ids(row(prompt, completion), tokenizer, spec)) == example.input_ids[:start]
            seen += 1
    assert seen > 300


def test_a_trailing_space_that_trimming_leaves_out_still_counts():
    """The pair "\\n " is one token here; its offsets name the newline alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: i for i, letter in enumerate([*"ab", "\u010a", "\u0120", "\u010a\u0120", "\u0120b", "</s>"])}
    backend = Tokenizer(models.BPE(vocab, merges=[("\u010a", "\u0120"), ("\u0120", "b")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    example = encode(row("a\n", " b"), tokenizer, PLAIN)
    assert tokenizer.convert_ids_to_tokens(list(example.input_ids)) == [
        "a",
        "\u010a\u0120",
        "\u0120b",
        "</s>",
    ]
    assert example.is_target == (False, True, True, True)


def test_the_prompt_of_a_generation_is_the_training_prefix(bpe):
    for one in read_rows(shipped("address_json", "valid")):
        example = encode(one, bpe, PLAIN)
        first = example.is_target.index(True)
        assert tuple(prompt_ids(one, bpe, PLAIN)) == example.input_ids[:first]
        # and a prompt alone, of which no completion is known, begins the same way
        assert prompt_ids(Row(prompt=one.prompt, completion=""), bpe, PLAIN) == list(example.input_ids[:first])


def test_a_prompt_is_never_cut_for_generation(words):
    assert prompt_ids(row(), words, DataSpec(max_tokens=2)) == [3, 4, 5]


def test_generation_needs_no_end_token():
    assert prompt_ids(row(), make_words(eos=None), PLAIN) == [3, 4, 5]


def test_generation_from_nothing_is_refused_and_not_begun_with_the_answer(words):
    assert "the prompt is empty" in refusal(prompt_ids, row(prompt=""), words, PLAIN)
    assert "the row is plain text" in refusal(prompt_ids, Row(text="Q: one"), words, PLAIN)
    assert prompt_ids(row(prompt=""), make_words(front=True), PLAIN) == [BOS]


def test_a_long_row_is_cut_to_its_first_tokens_and_counted(words):
    encoded = encode_all([row(), row("Q:")], words, DataSpec(max_tokens=4))
    assert encoded.examples[0] == Example((3, 4, 5, 9), (False, False, False, True), "train.jsonl line 412", True)
    assert [example.was_cut for example in encoded.examples] == [True, False]
    assert (encoded.n_rows, encoded.n_cut, encoded.n_skipped) == (2, 1, 0)
    assert (encoded.lengths, encoded.n_tokens, encoded.n_targets) == ([4, 3], 7, 3)


def test_a_row_of_exactly_max_tokens_is_not_cut(words):
    assert not encode(row(), words, DataSpec(max_tokens=5)).was_cut


def test_a_long_row_is_skipped_and_counted(words):
    spec = DataSpec(max_tokens=4, too_long="skip")
    assert encode(row(), words, spec) is None
    encoded = encode_all([row(), row("Q:")], words, spec)
    assert (encoded.n_rows, encoded.n_cut, encoded.n_skipped, encoded.lengths) == (2, 0, 1, [3])


def test_a_long_row_is_refused_where_the_recipe_says_so(words):
    message = refusal(encode, row(), words, DataSpec(max_tokens=4, too_long="error"))
    assert message.startswith("train.jsonl line 412: the row has 5 tokens, max_tokens is 4.")
    assert "data.max_tokens=5" in message


def test_all_rows_too_long_are_refused_with_the_numbers(words):
    message = refusal(encode_all, [row(), row("Q: one two three")], words, DataSpec(max_tokens=4, too_long="skip"))
    assert message.startswith(
        "no row of train.jsonl is left: all 2 are longer than max_tokens 4 (the shortest has 5 tokens, the longest 6)."
    )
    assert "data.max_tokens=6" in message


def test_no_rows_at_all_are_refused(words):
    assert "no rows to encode" in refusal(encode_all, [], words, PLAIN)


@pytest.mark.parametrize(
    ("bad", "spec", "reason"),
    [
        (row(completion=""), DataSpec(append_end=False), "the completion is empty and append_end false"),
        (row(), DataSpec(max_tokens=3), "the first is token 4 of 5, and the row is cut to max_tokens 3"),
        (row("", ""), PLAIN, "it has 1 token(s), and nothing stands before the first"),
        (Row(text="", source="train.jsonl", line=412), DataSpec(append_end=False), "it has 0 token(s)"),
    ],
)
def test_a_row_without_targets_is_refused_with_its_place(words, bad, spec, reason):
    good = Row(prompt="Q:", completion="yes no", source="train.jsonl", line=411)
    message = refusal(encode_all, [good, bad, good, bad], words, spec)
    assert message.startswith(f"train.jsonl line 412: no token of this row is a target: {reason}")
    assert message.endswith("1 more of the 4 rows have none.")


def test_an_end_that_the_tokenizer_lacks_is_refused():
    message = refusal(encode, row(), make_words(eos=None), PLAIN)
    assert message.startswith("train.jsonl line 412: an end token is to be appended, and this tokenizer has none")
    assert encode(row(), make_words(eos=None), DataSpec(append_end=False)).input_ids == (3, 4, 5, 9)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    assert "the tokenizer Slow cannot say which characters a token holds" in refusal(encode, row(), Slow(), PLAIN)


@pytest.mark.parametrize(
    "wrong",
    [{"max_tokens": 1}, {"too_long": "drop"}, {"template": "jinja"}, {"seperator": " "}, {"train": 3}],
)
def test_a_spec_refuses_what_it_cannot_do(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        DataSpec(**wrong)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        PLAIN.max_tokens = 3
