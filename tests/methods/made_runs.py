"""One method from a recipe to its adapter, through the doors that users take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from deltaw.cli.main import app
from deltaw.core.fingerprint import set_cache_dir
from deltaw.plan.plan import Counts
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe
from train.tiny_runs import recipe, run, save_base

EPOCHS = 6


def trained_and_inspected(
    folder: Path, settings: dict[str, Any], kind: str = "llama", lr: float | None = None
) -> tuple[list[float], dict[str, Any], Counts]:
    """Train a tiny base by recipe, with the method's own learning rate or `lr`.

    returns  mean loss of each epoch, or nearly; what `deltaw inspect ADAPTER --json` says; what was planned
    """
    set_cache_dir(folder / "cache")
    try:
        base = save_base(folder / "base", kind=kind)
        plain = {**recipe(base, train={"epochs": EPOCHS, "lr": lr}), "adapter": settings}
        if lr is None:
            del plain["train"]["lr"]
        counts = Planner(load_recipe(plain), Work.of_rows(2, 12)).plan().counts
        events = run(plain, folder / "run")
        steps = [event.loss for event in events if type(event).__name__ == "Step"]
        n = len(steps) // EPOCHS
        losses = [sum(steps[i : i + n]) / n for i in range(0, EPOCHS * n, n)]
        shown = CliRunner().invoke(app, ["inspect", events[-1].adapter, "--json"])
        assert shown.exit_code == 0, shown.output
        return losses, json.loads(shown.stdout), counts
    finally:
        set_cache_dir(None)
