"""What the files of a folder of runs say: recipes, events, and how far each run came."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from deltaw.errors import BadInput, DeltawError, NotFound, near
from deltaw.train.recipe import load_recipe

Plain = dict[str, Any]
KEPT = ("data", "registry", "recipes")
"""Names in a folder of runs that are no runs."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TOLD = re.compile(r"^(?:[a-z_]\w*\.)*([A-Z]\w*): ", re.MULTILINE)
_COUNTED = {"step": ("step", "tokens", "seconds"), "eval": ("step", "seconds")}
_TOLD_OF = {"start": {"n_steps", "parameters"}, "eval": {"value", "loss", "is_best"}}
"""What an event must hold: numbers, and anything."""
_OF_A_RUN = ("loss", "lr", "tokens_per_s", "peak_rss_mb", "growth")


class RunFiles:
    """A folder of runs: RUNS/NAME as `deltaw train` makes it, RUNS/recipes/NAME.yaml where the workbench began it."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.recipes = runs / "recipes"

    def folder(self, name: str) -> Path:
        """RUNS/NAME. Raises BadInput for a name that cannot be a run's."""
        if not NAME.fullmatch(name) or name in KEPT:
            raise BadInput(
                f"a run cannot be called {name!r}: use letters, digits, '.', '_' and '-', at most 64, beginning with a "
                f"letter or digit; {', '.join(KEPT)} are taken."
            )
        return self.runs / name

    def recipe(self, name: str) -> Path:
        """Where the recipe of a run lies that the workbench began."""
        return self.recipes / f"{self.folder(name).name}.yaml"

    def log(self, name: str) -> Path:
        """What the training process wrote to stderr the last time."""
        return self.recipes / f"{self.folder(name).name}.log"

    def names(self) -> list[str]:
        """Every run, in the order of names."""
        begun = {p.parent.name for p in self.runs.glob("*/run.json")}
        asked = {p.stem for p in self.recipes.glob("*.yaml")}
        return sorted(n for n in begun | asked if NAME.fullmatch(n) and n not in KEPT)

    def find(self, name: str) -> Path:
        """The folder of a run that is there. Raises NotFound with near names."""
        if not NAME.fullmatch(name) or name not in (known := self.names()):
            raise NotFound(f"there is no run {name!r}.{near(name, self.names())}")
        return self.folder(known[known.index(name)])

    def settings(self, name: str) -> Plain:
        """The whole recipe of a run, as plain data; {} where it cannot be read."""
        try:
            if (path := self.folder(name) / "run.json").is_file():
                return dict(json.loads(path.read_text(encoding="utf-8"))["recipe"])
            return load_recipe(self.recipe(name)).plain()
        except (DeltawError, OSError, ValueError, KeyError, TypeError, RecursionError):
            return {}

    def text(self, name: str) -> str | None:
        """The recipe that the workbench wrote; None: the run was begun elsewhere."""
        try:
            return self.recipe(name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None

    def given(self, name: str) -> Plain | None:
        """The same as plain data; None also where it was damaged."""
        try:
            found = json.loads(json.dumps(yaml.safe_load(self.text(name) or ""), default=str))
        except (yaml.YAMLError, ValueError, TypeError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def failure(self, name: str) -> str | None:
        """The sentence with which the last process failed; None where it left none."""
        path = self.log(name)
        said = path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""
        if not said or "\nStopped" in f"\n{said}":
            return None
        found = [m for m in _TOLD.finditer(said) if m[1] in _ours() or "Traceback (most recent call last)" in said]
        return " ".join(said[found[-1].end() :].split()) if found else None

    def events(self, name: str) -> list[Plain]:
        """Every event of metrics.jsonl, in order."""
        path = self.folder(name) / "metrics.jsonl"
        try:
            now = path.stat()
        except OSError:
            return []
        return _parsed(path, now.st_size, now.st_mtime_ns)

    def facts(self, name: str) -> Plain:
        """How far a run came: its last numbers, None where they are not known."""
        events, settings = self.events(name), self.settings(name)
        found: Plain = {"name": name, "mine": self.recipe(name).is_file(), **_of_settings(settings)}
        start = _last(events, "start")
        step = _last(events, "step") or {}
        evaluations = [e for e in events if e["event"] == "eval"]
        grown = _last(events, "step", lambda e: e.get("growth") is not None)
        best = next((e for e in reversed(evaluations) if e["is_best"]), None)
        found |= {"step": step.get("step", 0), "n_steps": start and start["n_steps"]}
        found |= {key: step.get(key) for key in _OF_A_RUN} | {"growth": grown and grown["growth"]}
        found |= {"parameters": start and start["parameters"], "best": best and best["value"]}
        found["evaluated"] = evaluations[-1]["value"] if evaluations else None
        found["seconds"] = round(sum(e["seconds"] for e in events if e["event"] in ("step", "eval")), 3)
        found["tokens"] = sum(e["tokens"] for e in events if e["event"] == "step")
        first = self.folder(name) / "run.json"
        found["begun"] = _written(first) or _written(self.recipe(name)) or 0.0
        return found

    def series(self, name: str) -> Plain:
        """Curves of a run: {"steps": [...], "evals": [...]}; each point has `step`, and `tokens`, `seconds` so far."""
        tokens, seconds = 0, 0.0
        found: Plain = {"steps": [], "evals": []}
        for e in self.events(name):
            if e["event"] not in ("step", "eval"):
                continue
            tokens, seconds = tokens + e.get("tokens", 0), seconds + e["seconds"]
            at = {"step": e["step"], "tokens": tokens, "seconds": round(seconds, 3)}
            if e["event"] == "step":
                found["steps"].append(at | {key: e.get(key) for key in _OF_A_RUN})
            else:
                found["evals"].append(at | {"value": e["value"], "loss": e["loss"], "is_best": e["is_best"]})
        return found


def _ours(kind: type[DeltawError] = DeltawError) -> set[str]:
    """The names of an error and all that derive from it: how the program's last line begins when it fails."""
    return {kind.__name__}.union(*map(_ours, kind.__subclasses__()))


@lru_cache(maxsize=64)
def _parsed(path: Path, size: int, changed: int) -> list[Plain]:
    try:
        with open(path, "rb") as file:
            lines = file.read(size).split(b"\n")[:-1]  # what has no end yet is being written
    except OSError:  # removed since
        return []
    return [told for told in map(event_of, lines) if told is not None]


def event_of(line: bytes) -> Plain | None:
    """A line of metrics.jsonl as an event; NaN in it is None. None: it is none (a power cut can leave zeros)."""
    try:
        told = json.loads(line, parse_constant=lambda _: None)
        whole = all(isinstance(told[key], int | float) for key in _COUNTED.get(told["event"], ()))
        return told if whole and told.keys() >= _TOLD_OF.get(told["event"], frozenset()) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _last(events: list[Plain], kind: str, when: Callable[[Plain], bool] = lambda e: True) -> Plain | None:
    return next((e for e in reversed(events) if e["event"] == kind and when(e)), None)


def _of_settings(settings: Plain) -> Plain:
    adapter, base, judged = (_part(settings, key) for key in ("adapter", "base", "eval"))
    rank = adapter.get("rank")
    method = adapter.get("method", "")
    return {
        "method": f"{method}" + (f", rank {rank}" if rank is not None else ""),
        "base": Path(str(base.get("path", ""))).name,
        "metric": judged.get("metric"),
    }


def _part(settings: Plain, key: str) -> Plain:
    found = settings.get(key)
    return found if isinstance(found, dict) else {}
