"""The same run with another rank, step for step: what the loss could have been.

Order of rows and seeds are functions of the recipe, so step i of both runs sees the same rows, and their losses are
compared in pairs: the noise of the rows cancels.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deltaw.data.source import data_hash, read_rows
from deltaw.diagnose.curve import FEWEST_STEPS, Log
from deltaw.diagnose.facts import Trial
from deltaw.errors import BadInput, DataError, RunError
from deltaw.train.events import Step
from deltaw.train.run import train


def try_rank(
    identity: dict[str, Any],
    log: Log,
    rank: int,
    base: Path | None,
    data: Path | None,
    say: Callable[[str], None] = lambda _: None,
) -> Trial:
    """Train what run.json (`identity`) says with `rank` in a folder that is thrown away, and compare the losses.

    alpha is set so that the scale stays; ranks of single modules grow alike.
    base, data   instead of the paths in the run's recipe; the rows must be the run's own
    say          called with a sentence at each tenth of the steps

    Raises BadInput for a method without a rank, DataError for other rows, RunError for a run that is too short.
    """
    recipe: dict[str, Any] = identity["recipe"]
    adapter = dict(recipe["adapter"])
    was = adapter.get("rank")
    if was is None or "alpha" not in adapter:
        raise BadInput(f"--try-rank {rank}: method {adapter.get('method')!r} has no rank and alpha to change.")
    if rank == was or rank < 1:
        raise BadInput(f"--try-rank {rank}: give another rank than the run's ({was}), of 1 or more.")
    if len(log.steps) < FEWEST_STEPS:
        raise RunError(f"--try-rank {rank}: the run has {len(log.steps)} steps; fewer than {FEWEST_STEPS} say nothing.")
    path = data or recipe["data"].get("train")
    if path is None or not Path(path).exists():
        raise DataError(f"--try-rank {rank} needs the run's training rows; {path} is not there: give them as --data.")
    rows = read_rows(path)
    if data_hash(rows) != identity["data"]:
        raise DataError(f"{path} does not hold the rows that the run was trained on (their hash differs). Give those.")
    factor = rank / was
    by = math.sqrt(factor) if adapter.get("rslora") else factor
    adapter |= {"rank": rank, "alpha": adapter["alpha"] * by}
    adapter["rank_pattern"] = {k: max(1, round(r * factor)) for k, r in adapter.get("rank_pattern", {}).items()}
    adapter["alpha_pattern"] = {k: a * by for k, a in adapter.get("alpha_pattern", {}).items()}
    changed = {
        **recipe,
        "base": {**recipe["base"], **({"path": str(base)} if base else {})},
        "adapter": adapter,
        "data": {**recipe["data"], "valid": None},
        "train": {**recipe["train"], "save_every_s": 1e9, "tensorboard": False},
        "eval": {"keep": "last"},
        "budget": None,
    }
    with tempfile.TemporaryDirectory() as folder:
        every = max(1, len(log.steps) // 10)
        reached: dict[int, float] = {}
        for event in train(changed, Path(folder) / "trial", train_rows=path):
            if isinstance(event, Step):
                reached[event.step] = event.loss
                if event.step % every == 0:
                    say(f"step {event.step} of {len(log.steps)} with rank {rank}: loss {event.loss:.3g}")
    return paired({s.step: s.loss for s in log.steps}, reached, was, rank)


def paired(losses: dict[int, float], reached: dict[int, float], rank: int, other: int) -> Trial:
    """Two runs' losses by step, compared over the last quarter of the steps that both have."""
    steps = sorted(set(losses) & set(reached))
    last = steps[-max(2, len(steps) // 4) :]
    gains = [losses[s] - reached[s] for s in last]
    return Trial(
        rank=rank,
        other=other,
        steps=len(steps),
        loss=statistics.fmean(losses[s] for s in last),
        reached=statistics.fmean(reached[s] for s in last),
        gain=statistics.fmean(gains),
        noise=statistics.stdev(gains) / math.sqrt(len(gains)),
    )
