"""A chat as one text, and which of its characters the assistant says."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from deltaw.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BROKEN_TEMPLATE = (TemplateError, TypeError, ValueError)


def render(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    tools: Tools = None,
    open_turn: bool = False,
) -> str:
    """The chat as the tokenizer's template writes it.

    tools       the functions that the chat may call
    open_turn   end with the words that open the assistant's turn (the generation prompt)

    Raises DataError, which names `where`, if there is no template, it writes no tools, or it refuses the messages.
    """
    _template(tokenizer, where, tools)
    try:
        return str(
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=open_turn)
        )
    except _BROKEN_TEMPLATE as error:
        raise _refused(messages, where, error) from error


def assistant_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, tools: Tools = None
) -> tuple[str, list[Span]]:
    """The rendered chat, and the characters [start, end) of each turn of the assistant in it, in order.

    A span ends with the text that closes the turn ("<|im_end|>"), without whitespace after it. Where the
    template marks the assistant's words itself ({% generation %}), its marks count as they are.

    Raises DataError, which names `where`, if there is no template, it refuses the messages, it writes nothing
    for the assistant's turns, or it has no marks and writes a turn in another way when more turns follow.
    """
    if _MARKED.search(_template(tokenizer, where, tools)):
        text, spans = _marked_spans(messages, tokenizer, where, tools)
    else:
        text = render(messages, tokenizer, where, tools=tools)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_turn_span(text, messages, i, tokenizer, where, tools) for i in turns]
    spans = [(start, end) for start, end in spans if end > start]
    if not spans and any(message["role"] == "assistant" for message in messages):
        raise DataError(
            f"{where}: the chat template writes no word of the assistant's: there is nothing to learn.\n"
            "  Check the template's {% generation %} markers and that it prints assistant messages."
        )
    return text, spans


def _turn_span(
    text: str, messages: list[Message], turn: int, tokenizer: PreTrainedTokenizerBase, where: str, tools: Tools
) -> Span:
    """Where message `turn` stands in the text: after the opened turn, to the end of what closes it."""
    before = render(messages[:turn], tokenizer, where, tools=tools, open_turn=True) if turn else ""
    after = render(messages[: turn + 1], tokenizer, where, tools=tools)
    reason = None
    if turn == 0:
        reason = "nothing stands before it that opens the assistant's turn"
    elif not text.startswith(after):
        reason = "it is written in another way when other turns follow it"
    elif not after.startswith(before):
        reason = "what stands before it is written in another way when it follows (the generation prompt)"
    if reason:
        raise DataError(
            f"{where}: the chat template cannot be split at messages[{turn}]: {reason}.\n"
            "  Put {% generation %} ... {% endgeneration %} around the assistant's words in the template."
        )
    start, end = len(before), len(after.rstrip())
    content = str(messages[turn].get("content") or "").strip()
    if end <= start or (content and after.rstrip().endswith(content)):
        end = len(after)  # nothing but whitespace closes the turn, so that is what ends it
    return start, end


def _marked_spans(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, tools: Tools
) -> tuple[str, list[Span]]:
    """Text and spans by the template's own {% generation %} marks.

    These are the character spans from which `return_assistant_tokens_mask` makes its mask. The mask itself is
    not taken: it breaks off at a mark whose first character no token names (a trimmed space) and does
    not say so.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=_template(tokenizer, where, tools),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except _BROKEN_TEMPLATE as error:
        raise _refused(messages, where, error) from error
    return texts[0], list(spans[0])


def _template(tokenizer: PreTrainedTokenizerBase, where: str, tools: Tools) -> str:
    try:
        template = str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise DataError(
            f"{where}: a chat needs a chat template, and this tokenizer has none that can be used.\n"
            "  Take an instruct base, put a chat_template.jinja beside the tokenizer, or give the rows as "
            "prompt and completion with template: plain."
        ) from error
    if tools and not re.search(r"\btools\b", template):
        raise DataError(
            f"{where}: the row has tools, and the chat template does not write them.\n"
            "  Take a base whose template knows tools, or take 'tools' out of the rows."
        )
    return template


def _refused(messages: list[Message], where: str, error: Exception) -> DataError:
    roles = ", ".join(str(message["role"]) for message in messages) or "none"
    return DataError(
        f"{where}: the chat template refuses the messages (roles: {roles}): {error}\n"
        "  Give turns in the order the template expects."
    )
