"""What goes back to a client: OpenAI's shapes, whole and in pieces."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

from deltaw.serve.types import Output
from deltaw.serve.words import Words

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """Tokens read and made. n answers of one prompt count it once."""
    total = prompt_tokens + answer_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": answer_tokens, "total_tokens": total}


@dataclass
class Answer:
    """One choice while it grows.

    echo  the prompt, which stands before a completion's text where it was asked for
    """

    echo: str = ""
    text: str = ""
    outputs: list[Output] = field(default_factory=list)
    finished: str | None = None
    offset: int = 0
    is_begun: bool = False


class Shape:
    """The envelope of one request's answers, and how its choices look."""

    def __init__(self, request_id: str, model: str, content_id: str, words: Words, *, with_logprobs: bool) -> None:
        self.head = {"id": self.prefix + request_id, "created": int(time.time()), "model": model}
        self.head["system_fingerprint"] = f"dw-{content_id[:12]}" if content_id else None
        self.words, self.with_logprobs = words, with_logprobs

    prefix = ""
    whole = ""
    part = ""

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A finished choice."""
        raise NotImplementedError

    def pieces(self, index: int, answer: Answer, output: Output) -> dict[str, Any]:
        """What one output adds to a streamed choice."""
        raise NotImplementedError

    def body(self, answers: list[Answer], prompt_tokens: int) -> dict[str, Any]:
        """The whole response."""
        choices = [self.choice(i, a) for i, a in enumerate(answers)]
        made = sum(o.token is not None for a in answers for o in a.outputs)
        return {**self.head, "object": self.whole, "choices": choices, "usage": usage(prompt_tokens, made)}

    def chunk(self, choices: list[dict[str, Any]], told: dict[str, int] | None, *, tells: bool) -> bytes:
        """One event of a stream; tells: the client asked for usage, so that every event has the field."""
        return event({**self.head, "object": self.part, "choices": choices, **({"usage": told} if tells else {})})


class ChatShape(Shape):
    """chat.completion."""

    prefix, whole, part = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See Shape."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        told = self._logprobs(answer.outputs) if self.with_logprobs else None
        return {"index": index, "message": message, "logprobs": told, "finish_reason": answer.finished}

    def pieces(self, index: int, answer: Answer, output: Output) -> dict[str, Any]:
        """See Shape; the first piece of a choice says who speaks."""
        delta: dict[str, Any] = {} if answer.is_begun else {"role": "assistant", "content": ""}
        answer.is_begun = True
        if output.text or output.token is not None:
            delta["content"] = output.text
        told = self._logprobs([output]) if self.with_logprobs and output.token is not None else None
        return {"index": index, "delta": delta, "logprobs": told, "finish_reason": output.finished}

    def _logprobs(self, outputs: list[Output]) -> dict[str, Any]:
        content = []
        for output in (o for o in outputs if o.token is not None):
            top = [self._entry(token, logprob) for token, logprob in output.top]
            content.append({**self._entry(output.token, output.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token: int | None, logprob: float | None) -> dict[str, Any]:
        text, raw = self.words.piece(token or 0)
        return {"token": text, "logprob": finite(logprob), "bytes": raw}


class TextShape(Shape):
    """text_completion."""

    prefix, whole, part = "cmpl-", "text_completion", "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """See Shape."""
        told = self._logprobs(answer, answer.outputs) if self.with_logprobs else None
        text = answer.echo + answer.text
        return {"index": index, "text": text, "logprobs": told, "finish_reason": answer.finished}

    def pieces(self, index: int, answer: Answer, output: Output) -> dict[str, Any]:
        """See Shape; the first piece carries the prompt where it is echoed."""
        text = output.text if answer.is_begun else answer.echo + output.text
        answer.is_begun = True
        told = self._logprobs(answer, [output]) if self.with_logprobs and output.token is not None else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": output.finished}

    def _logprobs(self, answer: Answer, outputs: list[Output]) -> dict[str, Any]:
        tokens, own, tops, offsets = [], [], [], []
        for output in (o for o in outputs if o.token is not None):
            text = self.words.piece(output.token or 0)[0]
            top: dict[str, float] = {}
            for token, logprob in output.top:
                top.setdefault(self.words.piece(token)[0], finite(logprob))  # two ids may read alike: the likelier
            tokens.append(text)
            own.append(finite(output.logprob))
            tops.append(top)
            offsets.append(answer.offset)
            answer.offset += len(text)
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}


def finite(logprob: float | None) -> float:
    """JSON has no infinity: OpenAI writes -9999 for a token that cannot be."""
    return -9999.0 if logprob is None or logprob < -9999.0 else logprob
