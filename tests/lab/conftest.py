"""A tiny base on disk, a lab on it, and a lab on the real starter."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab_bench import STARTER, Bench

from deltaw.lab.base import Lab
from models import make_net


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama whose tokenizer knows single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("lab") / "tiny"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(["<|end|>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    sizes = {"vocab_size": len(letters) + 1, "eos_token_id": 0, "bos_token_id": None, "max_position_embeddings": 256}
    make_net("llama", **sizes).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Bench:
    return Bench(Lab(str(tiny_folder)))


@pytest.fixture(scope="session")
def starter() -> Bench:
    return Bench(Lab(STARTER))
