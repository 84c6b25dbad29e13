"""Chats: the assistant's turns are targets, with the text that closes them, and nothing else is."""

from __future__ import annotations

import pytest
from made_tokenizers import CHATML, held_bytes, make_bpe

from deltaw.data import DataSpec, Row, encode, encode_all, marked, prompt_ids
from deltaw.data.source import read_rows
from deltaw.errors import DataError

PLAIN, CHAT = DataSpec(), DataSpec(template="chat")
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n"
ASKED = "<|im_start|>user\nAddress?<|im_end|>\n<|im_start|>assistant\n"
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*contents: str, first: str = "user") -> Row:
    """Turns of user and assistant by turns, after a system message where that comes first."""
    roles = [first] * (first == "system") + ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Row(messages=messages, source="chat.jsonl", line=7)


def with_template(tokenizer_template: str | None):
    return make_bpe(template=tokenizer_template)


def refusal(call, *args) -> str:
    with pytest.raises(DataError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("trim", ["bpe", "trimming_bpe"])
def test_every_assistant_turn_with_its_end_is_a_target_and_the_newline_after_it_is_not(trim, request):
    tokenizer = request.getfixturevalue(trim)
    row = chat("Address: one\n", " yes,  sir ", "and \u00e9?", "no\n\nnever")
    pieces = [
        (f"{SYSTEM}<|im_start|>user\nAddress: one\n<|im_end|>\n<|im_start|>assistant\n", False),
        (" yes,  sir <|im_end|>", True),
        ("\n<|im_start|>user\nand \u00e9?<|im_end|>\n<|im_start|>assistant\n", False),
        ("no\n\nnever<|im_end|>", True),
        ("\n", False),
    ]
    example = encode(row, tokenizer, PLAIN)
    assert marked(example, tokenizer) == pieces
    flags: list[bool] = []
    for text, is_target in pieces:  # the same from the tokens alone, byte by byte
        flags += [is_target] * len(text.encode())
    assert example.is_target == tuple(any(flags[a:b]) for a, b in held_bytes(tokenizer, example.input_ids))
    assert list(example.input_ids) == tokenizer("".join(text for text, _ in pieces))["input_ids"]


def test_a_system_message_takes_the_place_of_the_default(bpe):
    row = chat("Be brief.", "Address?", "no", first="system")
    assert marked(encode(row, bpe, PLAIN), bpe) == [
        ("<|im_start|>system\nBe brief.<|im_end|>\n" + ASKED, False),
        ("no<|im_end|>", True),
        ("\n", False),
    ]


def test_prompt_and_completion_go_through_the_chat_template_where_the_spec_says_so(bpe):
    row = Row(prompt="Address?", completion="no")
    assert encode(row, bpe, CHAT).input_ids == encode(chat("Address?", "no"), bpe, PLAIN).input_ids
    assert encode(row, bpe, CHAT).is_target == encode(chat("Address?", "no"), bpe, PLAIN).is_target
    assert encode(row, bpe, PLAIN).input_ids != encode(row, bpe, CHAT).input_ids


def test_an_empty_answer_has_the_end_of_its_turn_as_target(bpe):
    example = encode_all([Row(prompt="Address?", completion="")], bpe, CHAT).examples[0]
    assert [piece for piece in marked(example, bpe) if piece[1]] == [("<|im_end|>", True)]


def test_generation_starts_after_the_words_that_open_the_assistants_turn(bpe):
    opened = SYSTEM + ASKED
    for row, spec in (
        (chat("Address?", "no", "really?", "yes"), PLAIN),
        (chat("Address?"), PLAIN),
        (Row(prompt="Address?", completion="no"), CHAT),
        (Row(prompt="Address?", completion=""), CHAT),
    ):
        assert prompt_ids(row, bpe, spec) == bpe(opened)["input_ids"]


@pytest.mark.parametrize(
    "template", [MARKED, MARKED.replace("{% gen", "{%- gen").replace("endgeneration %", "endgeneration -%")]
)
def test_a_templates_own_marks_are_followed(template):
    tokenizer = with_template(template)
    row = chat("Address?", "no <|im_end|>\nway", "really?", "yes")
    example = encode(row, tokenizer, PLAIN)
    assert [text for text, is_target in marked(example, tokenizer) if is_target] == [
        "no <|im_end|>\nway<|im_end|>",
        "yes<|im_end|>",
    ]
    theirs = tokenizer.apply_chat_template(
        row.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    assert example.input_ids == tuple(theirs["input_ids"])
    assert example.is_target == tuple(map(bool, theirs["assistant_masks"]))


def test_a_mark_that_starts_with_a_trimmed_space_is_not_lost():
    """transformers' own mask ends at such a mark: no token names its first character."""
    tokenizer = make_bpe(trim=True, template=MARKED)
    row = chat("Address?", " no", "really?", " yes")
    assert [text for text, is_target in marked(encode(row, tokenizer, PLAIN), tokenizer) if is_target] == [
        " no<|im_end|>",
        " yes<|im_end|>",
    ]


def test_marks_let_a_chat_begin_with_the_assistant():
    row = Row(messages=[{"role": "assistant", "content": "no"}, {"role": "user", "content": "Address?"}])
    tokenizer = with_template(MARKED)
    assert marked(encode(row, tokenizer, PLAIN), tokenizer) == [
        ("<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
        ("\n<|im_start|>user\nAddress?<|im_end|>\n", False),
    ]


def closed_by(closing: str) -> str:
    """A template like those of old base models: no word of its own closes a turn."""
    return (
        "{% for message in messages %}{{ 'address' if message['role'] == 'user' else 'assistant' }}:"
        f"{{{{ message['content'] + '{closing}' }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("closing", "turns", "text"),
    [
        ("\n", ("one", "no", "x", "yes"), "address:one\nassistant:[no\n]address:x\nassistant:[yes\n]"),
        (" ", ("one", "no"), "address:one assistant:[no ]"),
        # a token holds the space that closes the turn and the word after it
        (" ", ("one", "no", "x", "no"), "address:one assistant:[no address]:x assistant:[no ]"),
        ("\n\n", ("one", ""), "address:one\n\nassistant:[\n\n]"),
    ],
)
def test_a_turn_that_only_whitespace_closes_has_that_as_its_end(trim, closing, turns, text):
    tokenizer = make_bpe(trim=trim, template=closed_by(closing))
    pieces = marked(encode(chat(*turns), tokenizer, PLAIN), tokenizer)
    assert "".join(f"[{piece}]" if is_target else piece for piece, is_target in pieces) == text


def test_words_of_the_assistant_that_begin_the_document_have_no_target_before_the_second_token():
    tokenizer = make_bpe(
        template="{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
    )
    row = Row(messages=[{"role": "assistant", "content": "Address: one"}])
    n = len(encode(row, tokenizer, PLAIN).input_ids)
    assert n > 1
    assert encode(row, tokenizer, PLAIN).is_target == (False, *[True] * (n - 1))


def test_a_long_chat_is_cut_like_any_row(bpe):
    row = chat("Address?", "no", "really?", "yes")
    whole = encode(row, bpe, PLAIN)
    n = whole.is_target.index(True) + 1
    example = encode(row, bpe, DataSpec(max_tokens=n))
    assert (example.input_ids, example.was_cut) == (whole.input_ids[:n], True)
    message = refusal(encode_all, [row], bpe, DataSpec(max_tokens=n - 1))
    assert message.startswith(f"chat.jsonl line 7: no token of this row is a target: the first is token {n} of ")


def test_a_chat_without_an_assistant_is_refused(bpe):
    message = refusal(encode_all, [chat("be good", "Address?", first="system")], bpe, PLAIN)
    assert message.startswith("chat.jsonl line 7: no token of this row is a target: the assistant says nothing")
    assert "(roles: system, user)" in message


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "a chat needs a chat template, and this tokenizer has none"),
        (
            CHATML.replace("message['content']", "(message['content'] if loop.last else '...')"),
            "messages[1]: it is written in another way when other turns follow it",
        ),
        (
            CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>' }}"),
            "messages[1]: what stands before it is written in another way when it follows",
        ),
        (
            "{% generation %}{% endgeneration %}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "writes no word of the assistant's",
        ),
        (
            "{{ raise_exception('roles must alternate') }}",
            "refuses the messages (roles: user, assistant, user, assistant): roles must alternate",
        ),
        ("{% generation %}{{ raise_exception('no') }}{% endgeneration %}", "refuses the messages"),
        ("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}", "refuses the messages"),
        ("{% for m in messages %}", "refuses the messages"),
    ],
)
def test_a_template_that_cannot_say_who_speaks_is_refused(template, said):
    message = refusal(encode, chat("one", "no", "two", "yes"), with_template(template), PLAIN)
    assert message.startswith("chat.jsonl line 7: ")
    assert said in message


def test_a_chat_that_begins_with_the_assistant_needs_marks(bpe):
    row = Row(messages=[{"role": "assistant", "content": "no"}], source="chat.jsonl", line=7)
    message = refusal(encode, row, bpe, PLAIN)
    assert "cannot be split at messages[0]: nothing stands before it" in message
    assert "{% generation %}" in message


def test_prompt_and_completion_as_a_chat_need_a_template(words):
    assert "needs a chat template" in refusal(encode, Row(prompt="Q:", completion="yes"), words, CHAT)


TOOLS = [{"type": "function", "function": {"name": "lookup"}}]
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "lookup"}}]}
SAID = "{{ m.content }}{% for c in m.tool_calls or [] %}call {{ c.function.name }}{% endfor %}<|im_end|>"
WITH_TOOLS = (
    "{% for tool in tools %}<|im_start|>{{ tool.function.name }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
    "{% if m.role == 'assistant' %}[" + SAID + "]{% else %}" + SAID + "{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")])
def test_the_tools_of_a_row_are_written_and_its_calls_learned(marks):
    tokenizer = with_template(WITH_TOOLS.replace("[{{", marks[0] + "{{").replace("end|>]", "end|>" + marks[1]))
    turns = [{"role": "user", "content": "yes"}, CALL, {"role": "tool", "content": "no"}]
    row = read_rows([{"messages": [*turns, {"role": "assistant", "content": "no"}], "tools": TOOLS}])[0]
    front = "<|im_start|>lookup<|im_end|>\n<|im_start|>user\nyes<|im_end|>\n<|im_start|>assistant\n"
    assert marked(encode(row, tokenizer, PLAIN), tokenizer) == [
        (front, False),
        ("call lookup<|im_end|>", True),
        ("\n<|im_start|>tool\nno<|im_end|>\n<|im_start|>assistant\n", False),
        ("no<|im_end|>", True),
        ("\n", False),
    ]
    assert prompt_ids(row, tokenizer, PLAIN) == tokenizer(front)["input_ids"]


def test_tools_that_the_template_does_not_write_are_refused(bpe):
    row = Row(messages=chat("Address?", "no").messages, tools=TOOLS, source="chat.jsonl", line=7)
    said = refusal(encode, row, bpe, PLAIN)
    assert said.startswith("chat.jsonl line 7: the row has tools, and the chat template does not write them.")
