"""A desk with real runs and a real registry, on the tiny base of these tests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.lab.base import Lab
from deltaw.lab.desk import Desk, desk_in
from deltaw.methods import Lora
from deltaw.model.base import load_base
from deltaw.store.registry import Registry
from deltaw.train.run import train
from models import randomise

HERE = "http://127.0.0.1:8765"
SAME = {"origin": HERE}
STEPS = 20


def noise(base: Path, seed: int, size: float = 0.3, **provenance: object) -> Adapter:
    """A LoRA adapter of the tiny base that changes every answer; NaN as `size` breaks it."""
    model = load_base(base, dtype="float32")
    model.attach(Lora(rank=3, alpha=7), "noise", trainable=True)
    randomise(model, seed=seed, size=size)
    made: Adapter = model.adapter()
    return Adapter(made.spec, made.sites, made.places, fingerprint=made.fingerprint, provenance=provenance)


def foreign(made: Adapter, **provenance: object) -> Adapter:
    """The same numbers, trained on another base (it says)."""
    assert made.fingerprint is not None
    other = BaseFingerprint(**{**made.fingerprint.model_dump(), "name": "Other-7B", "weights": "ab" * 32})
    return Adapter(made.spec, made.sites, made.places, fingerprint=other, provenance=provenance)


def real_run(base: Path, out: Path) -> Path:
    """STEPS real steps on the tiny base."""
    recipe: dict[str, Any] = {
        "base": {"path": str(base), "dtype": "float32"},
        "adapter": {"method": "lora", "rank": 4, "alpha": 6},
        "data": {"max_tokens": 64},
        "train": {"steps": STEPS, "tokens_per_step": 40, "lr": 0.01, "save_every_s": 1000},
        "eval": {"keep": "last", "every_steps": 5},
    }
    rows = [{"prompt": f"key {i}", "completion": f"{i}{i}"} for i in range(8)]
    for _ in train(recipe, out, train_rows=rows, valid_rows=rows[:3]):
        pass
    return out


def filled(base: Path, root: Path, run: Path) -> Desk:
    """A desk with the run `first` and three names: support (two versions), child (made from support@1), other base."""
    desk = desk_in(root / "runs")
    desk.runs.mkdir(parents=True)
    (desk.runs / "first").symlink_to(run, target_is_directory=True)
    registry = Registry(desk.registry, create=True)
    one = noise(base, 1, metrics={"valid_loss": 0.5})
    two = noise(base, 2, metrics={"valid_loss": 0.25}, date="2026-11-01")
    registry.add("support", one)
    registry.add("support", two)
    registry.add("child", noise(base, 3, parents=[one.id]))
    registry.add("far", foreign(noise(base, 4), parents=[two.id]))
    return desk


def copied(desk: Desk, root: Path) -> Desk:
    """The same desk elsewhere, to be changed."""
    shutil.copytree(desk.runs, root / "runs", symlinks=True)
    return desk_in(root / "runs")


def exact_lab(base: Path, **given: Path) -> Lab:
    """A lab that computes in float32, where answers do not depend on who else is asked."""
    lab = Lab(str(base), given)
    lab.model = load_base(base, dtype="float32")
    for name, folder in given.items():
        lab.model.attach(folder, name)
    lab.model.use(None)
    return lab
