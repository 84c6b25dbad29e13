"""A tiny base on disk, a lab on it, a lab on the real starter, and a Chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_bench import STARTER, Bench
from lab_chromium import MISSING, start
from lab_page import Page, served

from deltaw.core.fingerprint import cache_dir, set_cache_dir
from deltaw.lab.base import Lab
from deltaw.lab.server import make_app
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
    """A lab on the real starter, loaded with the user's cache, where its fingerprint lies; other tests set theirs."""
    before, named = cache_dir(), os.environ.get("DELTAW_CACHE")
    set_cache_dir(Path(named) if named else None)
    try:
        bench = Bench(Lab(STARTER))
        assert bench.lab.model.fingerprint is not None
    finally:
        set_cache_dir(before)
    return bench


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for a file's tests: playwright's loop runs as long, and others want to start one of their own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = start(playwright)
        assert one is not None, MISSING
        yield one
        one.close()


@pytest.fixture(scope="module")
def url(starter: Bench) -> Iterator[str]:
    """The lab on the real starter, served as `deltaw lab` serves it.

    It ends with the module: what it makes ahead builds networks, for which transformers sets the dtype of the process,
    and tests of other folders build theirs.
    """
    with served(make_app(starter.lab)) as address:
        yield address


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    """A fresh page on it."""
    one = Page(browser, url)
    yield one
    one.close()
