"""Text arrives as it settles: whole characters, cut before stop strings, and JSON where a schema asks for it."""

from __future__ import annotations

import json
import random

import pytest
from serving import ask, base
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.errors import SpecError
from deltaw.model.model import Model
from deltaw.serve.engine import Engine
from deltaw.serve.text import TextStream
from deltaw.serve.types import Sampling
from models import make_net

HALF = "\N{REPLACEMENT CHARACTER}"
SAMPLE = "Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n \N{GRINNING FACE}\N{EURO SIGN} and  so on\n\n."


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the end token: characters beyond ASCII take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_model() -> Model:
    tokenizer = byte_tokenizer()
    net = make_net("llama", vocab_size=len(tokenizer) + 3, max_position_embeddings=512)
    net.generation_config.eos_token_id = tokenizer.eos_token_id
    return Model(net, tokenizer)


def streamed(tokens: list[int], stop: tuple[str, ...] = (), prompt: list[int] | None = None) -> tuple[list[str], bool]:
    stream = TextStream(byte_tokenizer(), prompt or [], stop)
    parts = []
    for token in tokens:
        text, stopped = stream.push(token)
        parts.append(text)
        if stopped:
            return parts, True
    return [*parts, stream.end()], False


def test_serve_text_is_whole_characters():
    ids = byte_tokenizer().encode(SAMPLE)
    assert len(ids) == len(SAMPLE.encode()) > len(SAMPLE)
    for n in range(len(ids) + 1):
        parts, _ = streamed(ids[:n], prompt=ids[:5])
        assert "".join(parts) == SAMPLE.encode()[:n].decode(errors="ignore")
        assert HALF not in "".join(parts)
    parts, _ = streamed(ids)
    assert [p for p in parts if p] == list(SAMPLE), "each character comes with its last byte"


@pytest.mark.parametrize("stop", [("so",), ("d  s", "  so"), ("\n\n.",), ("\n.", "\n\n\n"), ("zz", ".x"), (SAMPLE,)])
def test_serve_text_ends_before_stop_strings(stop):
    parts, stopped = streamed(byte_tokenizer().encode(SAMPLE), stop)
    found = [SAMPLE.find(word) for word in stop if word in SAMPLE]
    assert stopped == bool(found)
    assert "".join(parts) == (SAMPLE[: min(found)] if found else SAMPLE)


def test_serve_text_stops_in_random_texts():
    rng = random.Random(4)
    encode = byte_tokenizer().encode
    for _ in range(150):
        text = "".join(rng.choice("ab\N{EURO SIGN}") for _ in range(12))
        stop = tuple("".join(rng.choice("ab\N{EURO SIGN}") for _ in range(rng.randint(1, 4))) for _ in range(2))
        parts, stopped = streamed(encode(text), stop)
        ends = [text.find(w) + len(w) for w in stop if w in text]
        seen = text[: min(ends)] if ends else text  # what is there when the first stop string is complete
        cut = min((seen.find(w) for w in stop if w in seen), default=len(text))
        assert (stopped, "".join(parts)) == (bool(ends), text[:cut]), (text, stop)


def test_serve_text_of_the_engine():
    engine = Engine(byte_model(), kv_bytes=1 << 22)
    prompt = byte_tokenizer().encode("hello")
    drawn = [
        ask(engine, prompt, Sampling(max_tokens=60, temperature=1.5, seed=s, ignore_eos=True)).wait() for s in range(4)
    ]
    for heard in drawn:
        whole = byte_tokenizer().decode(heard.tokens, skip_special_tokens=True)
        assert heard.text.rstrip(HALF) == whole.rstrip(HALF)
    ascii_part = next(w for h in drawn for w in h.text.split(HALF) if len(w) > 2)[1:3]
    seed = next(s for s, h in enumerate(drawn) if ascii_part in h.text)
    cut = ask(engine, prompt, Sampling(max_tokens=60, temperature=1.5, seed=seed, ignore_eos=True, stop=(ascii_part,)))
    assert cut.wait().text == drawn[seed].text.split(ascii_part)[0]
    assert cut.finished == "stop"
    assert cut.tokens == drawn[seed].tokens[: len(cut.tokens)]
    engine.close()
    bare = Engine(Model(make_net("llama")), kv_bytes=1 << 20)
    assert ask(bare, [3], max_tokens=3, ignore_eos=True).wait().text == ""
    with pytest.raises(SpecError, match="Stop strings need a tokenizer"):
        ask(bare, [3], stop=("a",))
    bare.close()


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z]+$"},
        "many": {"type": "array", "items": {"enum": ["red", "green", 3]}, "maxItems": 3},
        "n": {"type": "integer", "minimum": 5, "maximum": 17},
    },
    "required": ["name", "many", "n"],
    "additionalProperties": False,
}


def obeys(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"name", "many", "n"}
    assert 1 <= len(value["name"]) <= 6
    assert len(value["many"]) <= 3
    assert set(value["many"]) <= {"red", "green", 3}
    assert 5 <= value["n"] <= 17


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_serve_text_obeys_a_schema(ignore_eos):
    engine = Engine(byte_model(), kv_bytes=1 << 22)
    prompt = byte_tokenizer().encode("hello")
    how = {"max_tokens": 120, "ignore_eos": ignore_eos, "json_schema": json.dumps(SCHEMA)}
    heard = [ask(engine, prompt, Sampling(temperature=1.5, seed=s, **how)) for s in range(6)]
    heard += [ask(engine, prompt, Sampling(temperature=0.0, **how))]
    beside = ask(engine, prompt, max_tokens=40, ignore_eos=True)
    for h in heard:
        assert h.wait().finished == "stop"
        obeys(h.text)
    assert len({h.text for h in heard}) > 3
    assert len(beside.wait().tokens) == 40
    engine.close()


def test_serve_text_any_object_and_schemas_that_cannot_be():
    engine = Engine(byte_model(), kv_bytes=1 << 22)
    prompt = byte_tokenizer().encode("hello")
    some = [ask(engine, prompt, Sampling(max_tokens=200, temperature=0.8, seed=s, json_schema="{}")) for s in range(4)]
    for h in some:
        assert h.wait().text.startswith("{")
        assert h.finished in ("stop", "length")
        if h.finished == "stop":
            assert isinstance(json.loads(h.text), dict)
    broken = {
        "{": "not JSON",
        "[1]": "is an object",
        "[" * 9**6: "not JSON",
        '{"type": "nothing"}': "cannot be followed",
    }
    for wrong, says in broken.items():
        with pytest.raises(SpecError, match=says):
            ask(engine, prompt, Sampling(json_schema=wrong))
    engine.close()
    assert engine.stats().kv_bytes_used == 0
    wordless = Engine(base("gpt2"), kv_bytes=1 << 20)
    wordless.model.tokenizer = wordless.model._own_tokenizer = None
    with pytest.raises(SpecError, match="needs a tokenizer"):
        ask(wordless, [3], Sampling(json_schema="{}"))
    wordless.close()
