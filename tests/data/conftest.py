"""The made tokenizers as fixtures."""

from __future__ import annotations

import pytest
from made_tokenizers import make_bpe, make_words
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def words() -> PreTrainedTokenizerFast:
    return make_words()


@pytest.fixture(scope="session")
def bpe() -> PreTrainedTokenizerFast:
    return make_bpe()


@pytest.fixture(scope="session")
def trimming_bpe() -> PreTrainedTokenizerFast:
    return make_bpe(trim=True)
