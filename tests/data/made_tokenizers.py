"""Tokenizers made in code: one of whole words, whose ids a test can write down, and BPEs with real merges."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SHIPPED = Path(__file__).parents[2] / "data"

# SmolLM2's
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END = 1  # the word tokenizer's end token, also its padding
BOS = 2
WORDS = ["<unk>", "</s>", "<s>", "Q:", " one", " two", " three", " four", "A:", " yes", " no", "yes", " "]


def make_words(*, front: bool = False, back: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    """A token is a word with the space before it; `front` and `back` add <s> and </s> to every text."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[^ ]+| "), "isolated")
    backend.decoder = decoders.Fuse()
    if front or back:
        single = " ".join(["<s>"] * front + ["$A"] + ["</s>"] * back)
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", END)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token=eos, unk_token="<unk>"
    )


def make_bpe(*, trim: bool = False, template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE like SmolLM2's, trained on the shipped rows; `trim` as in Llama 3 (trim_offsets)."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = shipped("address_json", "valid") + shipped("supersense", "valid")
    backend.train_from_iterator([row["prompt"] + " " + row["completion"] for row in rows], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def shipped(name: str, split: str) -> list[dict]:
    """The rows of a data set that ships, read the plain way."""
    return [json.loads(line) for line in (SHIPPED / name / f"{split}.jsonl").read_text("utf-8").splitlines()]


def held_bytes(tokenizer: PreTrainedTokenizerFast, ids) -> list[tuple[int, int]]:
    """The bytes [start, end) of the text that each token of a byte-level BPE holds, from the tokens alone."""
    spans, at = [], 0
    for token_id, token in zip(ids, tokenizer.convert_ids_to_tokens(list(ids)), strict=True):
        n = len(token.encode() if token_id in tokenizer.all_special_ids else token)  # one letter a byte
        spans.append((at, at + n))
        at += n
    return spans
