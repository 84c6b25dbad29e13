"""Tools as processes that step in turn: what the speed benches share. Standard library only, so peers can import it.

A worker prints {"ready": true, ...}, then for each line `step` on its input one JSON line: seconds, cpu_s, loss, memory
and what the tool adds. It ends with its input. Memory is in MB (10^6 bytes), null where it cannot be read:

    peak_rss_mb   the most this process has held, loading included (and the pages of files that loading maps)
    training_mb   the most since it was ready
    step_mb       that, less what it held when it was ready
    resident_mb   what it holds after the step
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
Rows = dict[str, list[dict[str, Any]]]
"""Steps by tool; step i of all tools ran in the same round."""

# In a worker ---------------------------------------------------------------------------------------------------------


def serve(step: Callable[[], float | dict[str, Any]], **ready: Any) -> None:
    """Say that the worker is ready, then run `step` for each line; it returns its loss, or values by name."""
    turns = Turns(**ready)
    while turns.wait():
        found = step()
        turns.done(found if isinstance(found, dict) else {"loss": found})


class Turns:
    """The worker's side of the talk. Making it says that the worker is ready."""

    def __init__(self, **ready: Any) -> None:
        self._memory = Memory()
        self._start = self._busy = 0.0
        print(json.dumps({"ready": True, "held_mb": self._memory.held, **ready}), flush=True)

    def wait(self) -> bool:
        """Wait to be told to step; False at the end."""
        line = sys.stdin.readline().strip()
        if line not in ("step", ""):
            raise SystemExit(f"{Path(sys.argv[0]).name}: unknown line {line!r}; the only one is 'step'")
        self._start, self._busy = time.perf_counter(), time.process_time()
        return line == "step"

    def done(self, values: dict[str, Any]) -> None:
        """Tell what the step took and gave."""
        times = {"seconds": time.perf_counter() - self._start, "cpu_s": time.process_time() - self._busy}
        print(json.dumps(times | self._memory.now() | values), flush=True)


class Memory:
    """Memory of this process; the high-water mark begins again where this is made (Linux)."""

    def __init__(self) -> None:
        self.before, self.held = status_mb("VmHWM"), status_mb("VmRSS")
        again = Path("/proc/self/clear_refs")
        self._is_again = os.access(again, os.W_OK)
        if self._is_again:
            again.write_text("5")

    def now(self) -> dict[str, float | None]:
        """peak_rss_mb, training_mb, step_mb, resident_mb."""
        peak = status_mb("VmHWM")
        if peak is None or self.before is None or self.held is None:
            return dict.fromkeys(("peak_rss_mb", "training_mb", "step_mb", "resident_mb"))
        since = (peak, round(peak - self.held, 1)) if self._is_again else (None, None)
        found = {"peak_rss_mb": max(peak, self.before), "training_mb": since[0], "step_mb": since[1]}
        return found | {"resident_mb": status_mb("VmRSS")}


def status_mb(field: str) -> float | None:
    """VmRSS, VmHWM or RssAnon of this process; None where there is no /proc."""
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return round(int(found[1]) * 1024 / 1e6, 1) if found else None


# In the bench --------------------------------------------------------------------------------------------------------


class Worker:
    """A tool that does one step when asked. `ready` is what it said first, `start_s` how long that took."""

    def __init__(
        self, script: str, arguments: list[str], *, python: str = sys.executable, env: Mapping[str, str] | None = None
    ) -> None:
        began = time.perf_counter()
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [python, str(HERE / script), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=os.environ | (env or {}),
        )  # fmt: skip
        self.ready = self._read()
        self.start_s = time.perf_counter() - began

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):  # libraries print other things too
                found: dict[str, Any] = json.loads(line)
                return found
        code = self._process.wait()
        self._errors.seek(0)
        raise SystemExit(f"{self._errors.read()[-3000:]}\nworker {self._process.args} ended with {code}")

    def step(self) -> dict[str, Any]:
        """One step's values."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: reading says why
        return self._read()

    def close(self) -> None:
        """Let it end, at once if it does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


@contextmanager
def started(plans: Mapping[str, Callable[[], Worker]]) -> Iterator[dict[str, Worker]]:
    """The workers of some tools, one after the other; all are closed at the end, whatever happens."""
    with ExitStack() as stack:
        workers = {}
        for name, start in plans.items():
            workers[name] = start()
            stack.callback(workers[name].close)
            print(f"{name}: ready after {workers[name].start_s:.1f} s", flush=True)
        yield workers


def take_turns(workers: Mapping[str, Worker], steps: int, warm: int) -> tuple[Rows, Rows]:
    """(steps of each tool in turn, its warm-up steps, which are not counted)."""
    first: Rows = {name: [worker.step() for _ in range(warm)] for name, worker in workers.items()}
    rows: Rows = {name: [] for name in workers}
    for at in range(steps):
        for name, worker in workers.items():
            rows[name].append(worker.step())
        print(f"round {at + 1}:", ", ".join(f"{n} {r[-1]['seconds']:.3f} s" for n, r in rows.items()), flush=True)
    return rows, first


# Figures and rows ----------------------------------------------------------------------------------------------------


def spread(values: list[float], digits: int = 3) -> dict[str, float]:
    """Median and range."""
    low, high = min(values), max(values)
    return {"median": round(statistics.median(values), digits), "low": round(low, digits), "high": round(high, digits)}


def median_s(rows: Rows, tool: str) -> float:
    """Median seconds of a tool's steps."""
    return statistics.median(s["seconds"] for s in rows[tool])


def figures(steps: list[dict[str, Any]], first: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """One tool's steps of `tokens` tokens after its `first`, for the row and the table."""
    seconds = spread([s["seconds"] for s in steps])
    return {
        "median_s": seconds["median"],
        "min_s": seconds["low"],
        "max_s": seconds["high"],
        "cpu_s": round(statistics.median(s["cpu_s"] for s in steps), 3),
        "tokens_per_s": round(tokens / statistics.median(s["seconds"] for s in steps), 1),
        **{key: steps[-1][key] for key in ("peak_rss_mb", "training_mb", "step_mb", "resident_mb")},
        "losses": [round(s["loss"], 4) for s in (*first, *steps)],
    }


def check_same_work(first_losses: dict[str, float]) -> None:
    """Raise SystemExit unless the tools began with the same loss: then they did different work."""
    if first_losses and max(first_losses.values()) > 1.01 * min(first_losses.values()):
        raise SystemExit(f"the tools do not do the same step: their first losses are {first_losses}")


def compared(rows: Rows, tool: str, other: str) -> dict[str, Any]:
    """How many times as fast `tool` is as `other`, by paired steps; its memory's peak over the other's.

    memory            of the whole process, loading included
    training_memory   since both were ready
    """
    ours, theirs = rows[tool], rows[other]
    found: dict[str, Any] = {"tool": tool, "with": other}
    found["speed"] = spread([b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True)])
    for name, key in (("memory", "peak_rss_mb"), ("training_memory", "training_mb")):
        a, b = ours[-1][key], theirs[-1][key]
        found[name] = round(a / b, 3) if a and b else None
    return found


def said(found: dict[str, Any]) -> str:
    """What `compared` found, as a sentence."""
    s = found["speed"]
    speed = f"{s['median']:.2f}x as fast as {found['with']} ({s['low']:.2f} to {s['high']:.2f})"
    return f"{found['tool']}: {speed}; peak memory {found['memory']}x, {found['training_memory']}x without loading"


def identity(bench: str, packages: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a row begins with: bench, time, commit (+ where files differ from it), machine, versions."""
    from deltaw.train.checkpoint import machine, versions

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, cwd=HERE
    )
    return {
        "bench": bench,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "machine": machine() | cpu(),
        "versions": versions() | {name: version(name) for name in packages},
    }


def cpu() -> dict[str, Any]:
    """Model, family, load before the run and priority; null where they cannot be read."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in text.splitlines())}
    return {
        "cpu": fields.get("model name") or platform.processor() or None,
        "family": f"{fields['cpu family']}/{fields['model']}" if "cpu family" in fields else None,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "nice": os.nice(0) if hasattr(os, "nice") else None,
    }


def append(out: Path, row: dict[str, Any]) -> None:
    """Add a JSON line to a file, which is made with its folder."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a") as file:
        file.write(json.dumps(row) + "\n")
