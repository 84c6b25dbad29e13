"""How fast does the lab answer a control that is moved to a place where nobody was before?

The naive answer it must beat: 100 ms, what a hand on a slider takes for at once. What would change our mind: a control
whose slowest new position takes longer on a quiet machine.

    .venv/bin/python bench/bench_lab.py [--positions 12] [--seed 0] [--only 9,11,form] [--dry]

`deltaw lab` is started on the starter base, as a process of its own with empty folders. Each picture is opened, then
each of its controls is moved to random positions that were not asked for before, the others being where they were
left; pictures with a model are opened on the base, on 7B and on 70B. Then the form of a recipe: the first plan of a
base, and one change after the other. A time is of one HTTP request, from sending it to having read the answer. Between
two requests are --pause seconds, and --warm before the first. What a picture still makes is asked for at once: those
answers are "asked again", and "whole" is the time until all of a position was there. Prints median and slowest of each
in milliseconds; appends one JSON row to bench/results/lab.jsonl.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from workers import append, identity

RESULTS = Path(__file__).resolve().parent / "results" / "lab.jsonl"
PROGRAM = "from deltaw.cli.main import main; main()"
BASE = "smollm2-135m-instruct"
MODELS = (BASE, "llama-7b", "llama-70b")
STEP = (9, "step")
"""The control that trains the base when it is moved: a real step for each."""
Recipe = dict[str, Any]
Times = dict[str, list[float]]


class Client:
    """One connection to a lab, as a page keeps it."""

    def __init__(self, port: int, pause_s: float) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        self._headers = {"content-type": "application/json", "origin": f"http://127.0.0.1:{port}"}
        self._pause_s = pause_s

    def ask(self, path: str, given: Recipe | None = None, *, pause: bool = True) -> tuple[float, int, Any]:
        """Milliseconds, status and JSON of a GET, or of a POST of `given`."""
        body = None if given is None else json.dumps(given)
        time.sleep(self._pause_s if pause else 0)
        began = time.perf_counter()
        self._http.request("GET" if body is None else "POST", path, body, self._headers)
        answer = self._http.getresponse()
        text = answer.read()
        return 1000 * (time.perf_counter() - began), answer.status, json.loads(text)


@contextmanager
def opened(pause_s: float, warm_s: float) -> Iterator[Client]:
    """A lab of its own, and a connection to it."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as room:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [sys.executable, "-c", PROGRAM, "lab", "--base", BASE, "--port", str(port), "--runs", room]
        process = subprocess.Popen([*command, "--registry", f"{room}/registry"], stderr=subprocess.DEVNULL)
        try:
            _wait(port, process)
            time.sleep(warm_s)
            yield Client(port, pause_s)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"the lab ended with {process.returncode}")


class Walk:
    """One picture whose controls are moved one at a time, never twice to the same place."""

    def __init__(self, client: Client, frame: dict[str, Any], rng: random.Random) -> None:
        self.number = frame["number"]
        self.controls = {c["name"]: c for c in frame["controls"]}
        self._client, self._rng = client, rng
        self.state = {name: c["default"] for name, c in self.controls.items()}
        self._asked: set[str] = set()
        self.again: list[float] = []
        self.whole: list[float] = []

    def open(self, **changes: Any) -> float | None:
        """Milliseconds of the present position after `changes`; None: the library refuses it.

        Where parts of it are still made (picture 11), they are asked for until all are there: `again` has the
        milliseconds of these answers, `whole` of all of the position's together.
        """
        self.state |= changes
        self._asked.add(self._text())
        act = self.number == STEP[0] and self.state[STEP[1]] > 0
        query = "&".join(f"{k}={_plain(v)}" for k, v in self.state.items())
        path = f"/api/pictures/{self.number}"
        ms, status, found = self._client.ask(path, self.state) if act else self._client.ask(f"{path}?{query}")
        later: list[float] = []
        while status == 200 and found["data"].get("pending"):
            more, status, found = self._client.ask(f"{path}?{query}", pause=False)
            later.append(more)
        if status not in (200, 422):
            raise SystemExit(f"picture {self.number} answered {status} at {self.state}")
        if status == 200:
            self.again += later
            self.whole.append(ms + sum(later))
        return ms if status == 200 else None

    def moved(self, name: str, times: int) -> list[float]:
        """Milliseconds of up to `times` new positions of one control."""
        found: list[float] = []
        before = dict(self.state)
        for _ in range(8 * times):  # most are new; a switch has one other place
            self.state[name] = self._drawn(self.controls[name])
            if self.number == STEP[0] and name != STEP[1]:
                self.state[STEP[1]] = 0  # as the page does
            if self._text() not in self._asked and (ms := self.open()) is not None:
                found.append(ms)
            if len(found) == times:
                break
        if not found:
            self.state = before
        return found

    def _text(self) -> str:
        return json.dumps(self.state)

    def _drawn(self, control: dict[str, Any]) -> Any:
        if control["kind"] == "slider":
            steps = round((control["max"] - control["min"]) / control["step"])
            at = control["min"] + control["step"] * self._rng.randint(0, steps)
            return at if isinstance(control["step"], int) else round(at, 6)
        if control["kind"] == "switch":
            return self._rng.random() < 0.5
        if control["kind"] == "text":
            return f"number {self._rng.randrange(10**6)}"
        return self._rng.choice(control["options"])


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "+")


def pictures(client: Client, positions: int, rng: random.Random, only: list[str]) -> tuple[Times, Times]:
    """Milliseconds by "picture, control" and, where there is one, the model; and those until all of it was there."""
    found: Times = {}
    whole: Times = {}
    for frame in client.ask("/api/pictures")[2]["pictures"]:
        if only and str(frame["number"]) not in only:
            continue
        walk = Walk(client, frame, rng)
        has_model = "model" in walk.controls
        first = walk.open()
        found[f"{frame['number']} opened"] = [] if first is None else [first]
        for model in MODELS if has_model else ("",):
            where = f", {model}" if model else ""
            if model and (ms := walk.open(model=model)) is not None:
                found.setdefault(f"{frame['number']} model{where}", []).append(ms)
            for name in walk.controls:
                if name != "model":
                    found[f"{frame['number']} {name}{where}"] = walk.moved(name, positions)
        if has_model:
            found[f"{frame['number']} model, any"] = walk.moved("model", positions)
        if walk.again:
            found[f"{frame['number']} asked again"] = walk.again
            whole[f"{frame['number']} whole"] = walk.whole
    return {name: times for name, times in found.items() if times}, whole


def changes(rng: random.Random) -> list[tuple[str, Recipe]]:
    """One change of a recipe after the other, as a form makes them: (what is changed, its parts)."""
    return [
        ("rank", {"adapter": {"rank": rng.randint(2, 256)}}),
        ("rank", {"adapter": {"rank": rng.randint(2, 256)}}),
        ("alpha", {"adapter": {"alpha": rng.randint(2, 256)}}),
        ("targets", {"adapter": {"targets": ["q_proj", "v_proj"]}}),
        ("targets", {"adapter": {"targets": ["q_proj", rng.choice(["up_proj", "down_proj", "o_proj"])]}}),
        ("dropout", {"adapter": {"dropout": rng.choice([0.05, 0.1, 0.2])}}),
        ("tokens_per_step", {"train": {"tokens_per_step": 512 * rng.randint(2, 15)}}),
        ("micro_tokens", {"train": {"micro_tokens": 512 * rng.randint(1, 4)}}),
        ("checkpointing", {"train": {"checkpointing": True}}),
        ("tokens_per_step", {"train": {"tokens_per_step": 512 * rng.randint(16, 32)}}),
        ("lr", {"train": {"lr": rng.uniform(1e-5, 1e-3)}}),
        ("optimizer", {"train": {"optimizer": {"bits": 8}}}),
        ("format", {"base": {"format": "nf4", "double_quant": True}}),
        ("rank", {"adapter": {"rank": rng.randint(2, 256)}}),
        ("format", {"base": {"format": "int8", "double_quant": False}}),
        ("dtype", {"base": {"dtype": "float32"}}),
        ("max_tokens", {"data": {"max_tokens": rng.randint(64, 500)}}),
        ("budget", {"budget": {"memory_gb": rng.uniform(1, 400)}}),
        ("budget", {"budget": {"memory_gb": rng.uniform(1, 400)}}),
    ]


def forms(client: Client, rounds: int, rng: random.Random) -> Times:
    """Milliseconds of the workbench's plan by what of the recipe is changed, and the base."""
    methods = [m["name"] for m in client.ask("/api/work/train/form")[2]["methods"]]
    found: Times = {}
    for base in MODELS:
        for turn in range(rounds):
            recipe: Recipe = {"base": {"path": base}, "adapter": {"method": "lora"}}
            steps = [] if turn else [("first plan", {})]
            for name, parts in [*steps, *changes(rng)]:
                recipe = recipe | {key: recipe.get(key, {}) | part for key, part in parts.items()}
                _note(found, f"form {name}, {base}", client, recipe)
        for method in rng.sample(methods, len(methods)):
            _note(found, f"form method, {base}", client, {"base": {"path": base}, "adapter": {"method": method}})
    return found


def _note(found: Times, name: str, client: Client, recipe: Recipe) -> None:
    ms, status, told = client.ask("/api/work/train/plan", {"recipe": recipe})
    if status not in (200, 422):
        raise SystemExit(f"the form's plan answered {status}: {told}")
    found.setdefault(name, []).append(ms)


def table(times: dict[str, dict[str, float]]) -> str:
    """Lines of a table."""
    lines = ["| | positions | median, ms | slowest, ms |", "|---|---|---|---|"]
    lines += [f"| {name} | {t['positions']} | {t['median']:.0f} | {t['slowest']:.0f} |" for name, t in times.items()]
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--positions", type=int, default=8, help="new positions of each control")
    p.add_argument("--rounds", type=int, default=2, help="recipes that are changed from end to end, for each base")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--pause", type=float, default=0.02, help="seconds between two requests")
    p.add_argument("--warm", type=float, default=0.0, help="seconds between the lab's opening and the first request")
    p.add_argument("--only", default="", help="numbers of pictures, or form, with commas between; all")
    p.add_argument("--dry", action="store_true", help="print only, keep no row")
    args = p.parse_args()
    rng = random.Random(args.seed)
    with opened(args.pause, args.warm) as client:
        only = args.only.split(",") if args.only else []
        times, whole = pictures(client, args.positions, rng, only)
        times |= forms(client, args.rounds, rng) if not only or "form" in only else {}
    found = {
        name: {"positions": len(t), "median": round(statistics.median(t), 1), "slowest": round(max(t), 1)}
        for name, t in (times | whole).items()
    }
    print(table(found))
    every = [ms for t in times.values() for ms in t]
    over = sum(ms > 100 for ms in every)
    print(f"{len(every)} answers, {over} of them over 100 ms; the slowest took {max(every):.0f} ms")
    if not args.dry:
        settings = {k: getattr(args, k) for k in ("positions", "rounds", "seed", "pause", "warm")}
        append(RESULTS, identity("lab") | settings | {"answers": len(every), "over_100_ms": over, "times_ms": found})


if __name__ == "__main__":
    main()
