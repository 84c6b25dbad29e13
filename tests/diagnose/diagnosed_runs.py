"""Tiny runs to diagnose: a random base in Hugging Face layout, rows to learn by heart, and recipes for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deltaw.train.run import train
from models import make_net

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCAB = 1 + len(LETTERS)


def save_base(folder: Path, seed: int = 0, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random model (Llama by default, biases on) with a tokenizer of one token a byte."""
    net = make_net(kind, seed, dtype, vocab_size=VOCAB, eos_token_id=0, bos_token_id=None)
    net.get_output_embeddings().weight.data.mul_(4)
    net.config.architectures = [type(net).__name__]
    net.generation_config.eos_token_id, net.generation_config.bos_token_id = 0, None
    net.save_pretrained(folder)
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(["<|end|>", *LETTERS])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return folder


def rows(n: int, n_answers: int, seed: int = 0) -> list[dict[str, str]]:
    """n different keys of three letters, each with one of n_answers answers of two letters, to be learned by heart."""
    rng = random.Random(seed)
    keys = rng.sample([a + b + c for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"], n)
    answers = rng.sample([a + b for a in "abcdefghijkl" for b in "mnopqrstuvwx"], n_answers)
    return [{"prompt": key, "completion": answers[i % n_answers]} for i, key in enumerate(keys)]


def run(
    base: Path,
    out: Path,
    *,
    data: list[dict[str, str]],
    valid: list[dict[str, str]] | None = None,
    adapter: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A finished run's folder; `settings` are of the recipe's train section, but `format`: of the base."""
    how, steps = settings.pop("format", "dense"), settings.get("steps", 60)
    recipe = {
        "base": {"path": str(base), "dtype": "float32", "format": how},
        "adapter": adapter or {"method": "lora", "rank": 6, "alpha": 9},
        "data": {"max_tokens": 64},
        "train": {"steps": 60, "tokens_per_step": 160, "lr": 0.01, "save_every_s": 1000, **settings},
        "eval": {"every_steps": steps // 4, "keep": "last"} if valid else {"keep": "last"},
    }
    for _ in train(recipe, out, train_rows=data, valid_rows=valid):
        pass
    return out
