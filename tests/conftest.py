"""Settings of the whole suite: no network, one thread, and one tiny model per architecture."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers import PreTrainedModel

from models import ARCHITECTURES, make_net

torch.set_num_threads(1)


@pytest.fixture(params=ARCHITECTURES)
def net(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model of each of the eight architectures, in turn."""
    return make_net(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_net("llama")
