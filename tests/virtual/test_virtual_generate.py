"""Generation behind virtual tokens is what whole forwards say, step by step, whatever shares the batch."""

from __future__ import annotations

import pytest
import torch
from test_virtual_packs import OTHERS, other
from wearing import METHODS, PLAIN, N, wear

from deltaw.errors import AdapterError, DataError
from deltaw.methods import PrefixTuning
from deltaw.model.generate import generate
from deltaw.model.model import Model
from models import ARCHITECTURES, VOCAB, WINDOW, make_ids, make_net, randomise

PROMPTS = [make_ids(1, n, seed=40 + n)[0].tolist() for n in (3, 11, 7, 1, 7, 19)]
END = 2


@torch.no_grad()
def step_by_step(model: Model, prompt: list[int], most: int) -> list[int]:
    """Greedy, each token by a whole forward of the row alone, without a cache of tokens."""
    answer: list[int] = []
    while len(answer) < most:
        token = int(model.logits(torch.tensor([prompt + answer]))[0, -1].argmax())
        if token == END:
            break
        answer.append(token)
    return answer


def compare(model: Model, most: int = 9) -> list[list[int]]:
    model.net.generation_config.eos_token_id = END
    wanted = [step_by_step(model, p, most) for p in PROMPTS]
    for batch_size in (1, 4, 64):
        assert generate(model, PROMPTS, most, batch_size=batch_size) == wanted
    return wanted


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", [*ARCHITECTURES, "gemma2"])
def test_padded_batches_equal_whole_forwards(kind, method):
    assert max(map(len, PROMPTS)) > WINDOW + N  # windows hide virtual tokens from later ones
    model = wear(kind, method)
    behind = compare(model)
    model.use(None)
    assert generate(model, PROMPTS, 9) != behind


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", ["bloom", "falcon", "gptj", "gpt_neo", "nemotron", "qwen3"])
def test_architectures_that_cannot_pack_generate_too(kind, method):
    assert kind in OTHERS
    model = other(kind)
    model.attach(METHODS[method])
    randomise(model, size=0.7)
    compare(model)


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_row_that_leaves_does_not_disturb_the_others(kind, method):
    model = wear(kind, method)
    model.net.generation_config.eos_token_id = END
    whole = generate(model, PROMPTS, 8)
    cut = generate(model, PROMPTS, 8, give_up=lambda i, tokens: i % 3 == 0 and len(tokens) == 2)
    assert cut == [answer[:2] if i % 3 == 0 else answer for i, answer in enumerate(whole)]
    # END is an answer's end for some rows only
    likely = int(torch.tensor([t for answer in whole for t in answer]).mode().values)
    model.net.generation_config.eos_token_id = likely
    ended = generate(model, PROMPTS, 8)
    assert ended == [answer[: answer.index(likely)] if likely in answer else answer for answer in whole]
    assert len({len(answer) for answer in ended}) > 1


@pytest.mark.parametrize("method", PLAIN)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_learned_positions_count_virtual_tokens(kind, method):
    model = wear(kind, method)
    model.net.generation_config.eos_token_id = VOCAB + 1
    prompt = make_ids(1, 64 - N - 3)[0].tolist()
    assert len(generate(model, [prompt], 20)[0]) == 3  # then every position is taken
    with pytest.raises(DataError, match="has 60 tokens, and this base has 59 positions beside 5 virtual tokens"):
        generate(model, [make_ids(1, 60)[0].tolist()], 4)
    model.use(None)
    assert len(generate(model, [prompt], 20)[0]) == 3 + N


def test_a_state_without_keys_refuses_a_prefix_by_name():
    model = other("recurrent_gemma")
    model.attach(PrefixTuning(n_tokens=N, projection=False))
    with pytest.raises(AdapterError, match=r"RecurrentGemmaForCausalLM does not read plain keys and values"):
        generate(model, PROMPTS, 3)


@pytest.mark.parametrize("method", PLAIN)
def test_sampling_is_a_function_of_its_seed(method):
    from deltaw.model.generate import Sampling

    model = wear("llama", method)
    hot = [generate(model, PROMPTS, 6, sampling=Sampling(3.0, 1.0, seed)) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_base_without_an_adapter_generates_as_before():
    model = Model(make_net("llama"))
    compare(model)
