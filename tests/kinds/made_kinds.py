"""Tiny encoders and encoder-decoders with a tokenizer, their folders, and rows for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LABELS = ["noun.body", "noun.food", "noun.place"]
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
VOCAB = 53
BERT = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 24, "pad_token_id": 0, "hidden_dropout_prob": 0.3,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 6, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
    "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.3,
}  # fmt: skip
MAKE = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=3)),
    "masked": lambda: BertForMaskedLM(BertConfig(**BERT)),
    "encoder": lambda: BertModel(BertConfig(**BERT)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
}


def make_net(kind: str, seed: int = 0) -> PreTrainedModel:
    """A tiny random network with random biases and norms, in eval mode."""
    net = MAKE[kind]()
    net.config._attn_implementation = "eager"
    rng = torch.Generator().manual_seed(2000 + seed)
    done: set[int] = set()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if id(value) in done:
                continue
            done.add(id(value))
            noise = torch.randn(value.shape, generator=rng)
            centre = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
            value.copy_(centre + 0.3 * noise if value.ndim == 1 else noise * value.shape[-1] ** -0.5)
    return net.eval()


def make_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Words w3 ... w52; BERT's puts [CLS] in front and [SEP] behind, T5's puts </s> behind."""
    special = ["[PAD]", "[CLS]", "[SEP]"] if kind != "t5" else ["<pad>", "<unk>", "</s>"]
    words = {**{word: i for i, word in enumerate(special)}, **{f"w{i}": i for i in range(3, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=special[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if kind == "t5":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
        )
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def save_base(kind: str, folder: Path, seed: int = 0, **config: Any) -> Path:
    """The folder of a tiny base."""
    net = make_net(kind, seed)
    for key, value in config.items():
        setattr(net.config, key, value)
    net.save_pretrained(folder)
    make_tokenizer(kind).save_pretrained(folder)
    return folder


def text_of(seed: int, length: int) -> str:
    """Some words."""
    ids = torch.randint(5, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def labelled(n: int = 24) -> list[dict[str, str]]:
    """Texts of unlike lengths whose first word tells the label."""
    return [{"prompt": f"w{10 + i % 3} {text_of(i, 2 + i % 5)}", "completion": LABELS[i % 3]} for i in range(n)]


def answered(n: int = 24) -> list[dict[str, str]]:
    """Prompts of unlike lengths, answered by words that their first word tells."""
    answers = ["w20 w21", "w22", "w23 w24 w25"]
    return [{"prompt": f"w{10 + i % 3} {text_of(i, 2 + i % 5)}", "completion": answers[i % 3]} for i in range(n)]
