"""Bases on disk and adapters with noise in every tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_bases import save_base
from transformers import PreTrainedModel

from deltaw.core.fingerprint import set_cache_dir


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    set_cache_dir(tmp_path_factory.mktemp("cache"))
    yield
    set_cache_dir(None)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write a network as a base folder: saved(net, dtype=..., shard="10KB", tokenizer=True)."""

    def save(net: PreTrainedModel, name: str = "base", dtype: torch.dtype | None = None, **how: object) -> Path:
        return save_base(net if dtype is None else net.to(dtype), tmp_path / name, **how)

    return save
