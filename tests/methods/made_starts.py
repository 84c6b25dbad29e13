"""What the tests of starts begin from: rows as packs, and a base on disk."""

from __future__ import annotations

from pathlib import Path

import torch

from deltaw.data.pack import Batch
from models import make_batch, make_ids
from train.tiny_runs import save_base

IDS = make_ids()


def batches() -> list[Batch]:
    """Three packs of two documents."""
    return [make_batch([make_ids(1, 11, seed=n)[0], make_ids(1, 9, seed=n + 50)[0]]) for n in range(3)]


def quantised_folder(folder: Path) -> Path:
    """A base whose maps are wide enough for nf4's blocks to lose something."""
    torch.manual_seed(0)
    return save_base(folder, hidden_size=64, intermediate_size=96, max_position_embeddings=64)
