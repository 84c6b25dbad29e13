"""What goes into the engine and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How one request's tokens are chosen.

    max_tokens           at most so many are made
    temperature          0: the most likely token, nothing drawn
    top_p, top_k, min_p  what may be drawn: the likeliest tokens whose probabilities reach top_p; the k likeliest
                         (0: all); those with at least min_p times the likeliest one's probability
    repetition_penalty   divides positive logits and multiplies negative ones of tokens in the prompt or the answer
                         (CTRL, Keskar et al. 2019; as transformers does)
    presence_penalty, frequency_penalty  taken from logits of tokens in the answer: once; once per occurrence (OpenAI)
    logit_bias           (token, number) pairs: added to these tokens' logits, before penalties (OpenAI; vLLM's order)
    seed                 of this request's own random stream; None: one is drawn
    logprobs             None: none; k: of the chosen token and of the k likeliest, before penalties and temperature
    stop                 strings that end the answer; it is cut before them
    stop_token_ids       tokens that end the answer, beside the end tokens of the model
    ignore_eos           go on behind the end tokens of the model
    json_schema          JSON text of a schema that the answer obeys; "{}" for any object
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    json_schema: str | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to go on from `prompt`. n answers of one prompt are n requests with seeds seed + i.

    adapter  the name under which `Engine.load` knows it; None: the base alone
    """

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling
    adapter: str | None = None


@dataclass(frozen=True)
class Output:
    """What one step gave one request.

    token     the new token, or None where the request ended without one
    text      new text that is settled: no half characters, nothing that may yet be the start of a stop string
    logprob   of the token, where asked for; top: the likeliest (token, logprob), best first
    finished  None while it goes on; then "stop", "length", "cancelled" or "error" (`error` says what)
    """

    token: int | None
    text: str
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finished: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Stats:
    """What the engine holds now, and has done since it began.

    running, waiting  requests in steps; requests in the queue
    kv_bytes_used     bytes of pages that requests hold; kept prefixes that nobody uses count as free
    tokens_total      tokens made
    preemptions       times that a request lost its pages and computed again
    prefix_hits       prompt tokens that were read from pages instead of computed
    """

    running: int
    waiting: int
    kv_bytes_used: int
    kv_bytes: int
    tokens_total: int
    preemptions: int
    prefix_hits: int
