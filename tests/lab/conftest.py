"""A tiny base on disk, a lab on it, and a lab on the real starter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltaw.lab.base import Lab
from deltaw.lab.controls import read
from deltaw.lab.picture import Picture
from deltaw.lab.pictures import pictures_of
from models import make_net

STARTER = "smollm2-135m-instruct"


class Bench:
    """A lab with its pictures: `bench(13, rank=4)` is picture 13's plain data at these controls."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.pictures: dict[int, Picture] = pictures_of(lab)

    def __call__(self, number: int, **given: Any) -> dict[str, Any]:
        picture = self.pictures[number]
        return picture.compute(self.lab, read(picture.controls, given))

    def act(self, number: int, **given: Any) -> dict[str, Any]:
        picture = self.pictures[number]
        assert picture.act is not None
        return picture.act(self.lab, read(picture.controls, given))


def numbers(plain: dict[str, Any]) -> dict[str, Any]:
    """The values of the numbers that a picture shows, by key."""
    return {n["key"]: n["value"] for n in plain["numbers"]}


def texts(plain: dict[str, Any]) -> dict[str, str]:
    """The same as the page writes them."""
    return {n["key"]: n["shown"] for n in plain["numbers"]}


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
