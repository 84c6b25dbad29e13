"""A row's token depends on its logits, its seed and the token's number; settings mean what OpenAI's and HF's do."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from serving import METHODS, adapter_of, ask, base
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deltaw.serve.engine import Engine
from deltaw.serve.sampler import Chooser, choose
from deltaw.serve.types import Sampling
from models import make_ids

VOCAB = 41
LOGITS = 2.5 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(8))


def draws(sampling: dict[str, float], n: int = 3000, logits: torch.Tensor = LOGITS) -> Counter[int]:
    """How often each token is drawn over n seeds."""
    choosers = [Chooser(Sampling(**sampling, seed=seed), [1]) for seed in range(n)]
    return Counter(c.token for c in choose(logits.repeat(n, 1), choosers))


def hf(**given: float) -> torch.Tensor:
    """The probabilities after transformers' own processors, in the order that the page tells."""
    scores = TemperatureLogitsWarper(given.get("temperature", 1.0))(None, LOGITS[None])
    if "top_k" in given:
        scores = TopKLogitsWarper(int(given["top_k"]))(None, scores)
    if "top_p" in given:
        scores = TopPLogitsWarper(given["top_p"])(None, scores)
    if "min_p" in given:
        scores = MinPLogitsWarper(given["min_p"])(None, scores)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 1.0},
        {"temperature": 2.5},
        {"temperature": 0.7, "top_k": 3},
        {"temperature": 1.5, "top_p": 0.6},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.7},
        {"temperature": 1.3, "min_p": 0.08},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.9, "min_p": 0.2},
    ],
    ids=str,
)
def test_serve_sampling_draws_what_transformers_would(given):
    n = 3000
    wanted, got = hf(**given), draws(given, n)
    assert set(got) <= set(wanted.nonzero().flatten().tolist())
    for token, p in enumerate(wanted.tolist()):  # five standard deviations of a binomial
        assert abs(got[token] - n * p) <= 5 * math.sqrt(n * p * (1 - p)) + 1e-9, token
    assert (wanted > 0).sum() > 1


def test_serve_sampling_draws_from_a_vocabulary_of_several_blocks():
    wide = torch.full((700,), -40.0)
    chances = {0: 0.1, 127: 0.2, 128: 0.3, 640: 0.25, 699: 0.15}
    for token, p in chances.items():
        wide[token] = math.log(p)
    got = draws({"temperature": 1.0}, 3000, wide)
    assert set(got) == set(chances)
    for token, p in chances.items():
        assert abs(got[token] - 3000 * p) <= 5 * math.sqrt(3000 * p * (1 - p))


def test_serve_sampling_ranks_on_where_the_likeliest_do_not_reach_top_p():
    flat = torch.linspace(0.0, 1e-3, 5000)
    got = draws({"top_p": 0.9}, 800, flat)
    assert min(got) >= 0.1 * 5000 - 10
    assert min(got) < 0.1 * 5000 + 100


def test_serve_sampling_penalties_are_those_of_hf_and_openai():
    prompt, answer = [3, 4, 4], [7, 9, 7, 7]
    chooser = Chooser(
        Sampling(temperature=0.0, repetition_penalty=1.7, presence_penalty=0.4, frequency_penalty=0.3), prompt
    )
    for token in answer:
        chooser.took(token)
    got = LOGITS.clone()
    chooser.edit_(got)
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + answer]), LOGITS[None].clone())[0]
    wanted[7] -= 0.4 + 3 * 0.3
    wanted[9] -= 0.4 + 0.3
    torch.testing.assert_close(got, wanted)
    assert (LOGITS[[3, 4, 7, 9]] > 0).any()
    assert (LOGITS[[3, 4, 7, 9]] < 0).any()


def test_serve_sampling_biases_come_before_penalties():
    biases, seen = ((3, 9.0), (11, -100.0)), {3: 2, 4: 1}
    chooser = Chooser(Sampling(logit_bias=biases, repetition_penalty=1.7, presence_penalty=0.4, logprobs=1), [3])
    for token, times in seen.items():
        for _ in range(times):
            chooser.took(token)
    wanted = LOGITS.clone()
    wanted[3] += 9
    wanted[11] -= 100
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([list(seen)]), wanted[None])[0]
    wanted[list(seen)] -= 0.4
    got = LOGITS.clone()
    chooser.edit_(got)
    torch.testing.assert_close(got, wanted)
    choice = choose(LOGITS[None].clone(), [Chooser(Sampling(logit_bias=((11, 100.0),), temperature=0, logprobs=0), [])])
    assert choice[0].token == 11
    assert choice[0].logprob == pytest.approx(float(LOGITS.log_softmax(-1)[11]))  # the model's own


def test_serve_sampling_logprobs_are_the_models_own():
    chooser = Chooser(Sampling(temperature=0.0, logprobs=3, presence_penalty=9.0), [1])
    best = int(LOGITS.argmax())
    chooser.took(best)
    (choice,) = choose(LOGITS[None].clone(), [chooser])
    own = LOGITS.log_softmax(-1)
    assert choice.token == int(LOGITS.topk(2).indices[1]), "the penalty decides"
    assert choice.logprob == pytest.approx(float(own[choice.token]))
    assert [t for t, _ in choice.top] == LOGITS.topk(3).indices.tolist()
    assert [p for _, p in choice.top] == pytest.approx(own.topk(3).values.tolist())
    (none,) = choose(LOGITS[None].clone(), [Chooser(Sampling(temperature=0.0), [1])])
    assert (none.logprob, none.top) == (None, ())


def test_serve_sampling_broken_rows_are_told_apart():
    rows = LOGITS.repeat(4, 1)
    rows[1, 5] = float("nan")
    rows[3] = float("-inf")
    got = choose(rows, [Chooser(Sampling(temperature=t, seed=1), [1]) for t in (0.0, 0.0, 1.0, 1.0)])
    assert [c is None for c in got] == [False, True, False, True]


def test_serve_sampling_a_seed_gives_the_same_answer_in_any_company():
    model = base("llama")
    adapter = adapter_of(model, METHODS["lora"])
    prompt = make_ids(1, 13)[0].tolist()

    def answers(company: int, kv_bytes: int, **engine_takes: int) -> tuple[list[int], ...]:
        engine = Engine(model, kv_bytes=kv_bytes, **engine_takes)
        engine.load("a", adapter)
        how = {"max_tokens": 20, "ignore_eos": True, "temperature": 1.2}
        others = [
            ask(engine, make_ids(1, 3 + n % 9, seed=n)[0].tolist(), Sampling(**how, seed=n), "a" if n % 3 else None)
            for n in range(company)
        ]
        mine = [
            ask(engine, prompt, Sampling(**how, seed=5, top_p=0.8), "a"),
            ask(engine, prompt, Sampling(**how, seed=5, top_p=0.8), "a"),
            ask(engine, prompt, Sampling(**how, seed=6, top_p=0.8), "a"),
            ask(engine, prompt, Sampling(**how, seed=5), None),
        ]
        got = tuple(h.wait().tokens for h in mine)
        assert all(len(h.wait().tokens) == 20 for h in others)
        preempted.append(engine.stats().preemptions)
        engine.close()
        return got

    preempted: list[int] = []
    first = answers(0, 1 << 20)
    assert first[0] == first[1] != first[2]
    assert first[0] != first[3]
    assert answers(25, 1 << 20) == first
    assert answers(25, 12000, chunk_tokens=5) == first
    assert preempted[-1] > 0


def test_serve_sampling_without_a_seed_answers_differ():
    engine = Engine(base("llama"), kv_bytes=1 << 20)
    heard = [ask(engine, [5, 6], Sampling(max_tokens=20, ignore_eos=True, temperature=2.0)) for _ in range(4)]
    assert len({tuple(h.wait().tokens) for h in heard}) == 4
    engine.close()


def test_serve_sampling_ends():
    engine = Engine(base("llama"), kv_bytes=1 << 20)
    long = ask(engine, [9, 6, 17], max_tokens=30, ignore_eos=True).wait()
    assert len(long.tokens) == 30
    assert long.finished == "length"
    token = long.tokens[4]
    first = long.tokens.index(token)
    cut = ask(engine, [9, 6, 17], max_tokens=30, ignore_eos=True, stop_token_ids=(token,)).wait()
    assert cut.tokens == long.tokens[:first]
    assert cut.finished == "stop"
    assert cut.outputs[-1].token is None
    engine.close()
