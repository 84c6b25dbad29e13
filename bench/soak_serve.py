"""Does a server hold the same memory, pages, slots, threads and files after an hour of everything at random?

What would change our mind: memory that goes on growing, or one page, slot or connection that nobody gives back.

    .venv/bin/python bench/soak_serve.py [--minutes 60] [--cores 0.3] [--log soak.log]

A `deltaw serve` of the starter with little room (so that requests lose pages and adapters leave memory), and beside it
requests of every kind: whole, streamed, left in the middle, refused, with schemas, over adapters that are promoted,
rolled back, loaded and unloaded meanwhile. Once a period (a minute) traffic rests, and the server's process is looked
at: then nothing may be held. --cores bounds the server's processor time by letting requests wait. A run that is
stopped and continued (SIGSTOP) counts the time that it ran. Exits with 1 where the server failed. Linux only.
Appends a row to bench/results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx

from deltaw.model.base import load_base
from deltaw.serve.process import OwnServer, own_server
from deltaw.store.registry import Registry
from soak_traffic import Clock, Traffic, fill
from workers import HERE, append, identity

WORKERS = 9
REST_S = 20.0
WARM = 0.25  # of the time: caches fill, the allocator finds its size
MOST_MB_PER_HOUR = 16.0
SHORT = 20  # minutes: in a shorter run memory and threads are told, not judged
HELD = ("deltaw_requests_running", "deltaw_requests_waiting", "deltaw_sequences_admitted", "deltaw_kv_bytes_used")
COUNTED = {
    "preemptions": "deltaw_preemptions_total", "prefix_hits": "deltaw_prefix_hits_total",
    "left": "deltaw_cancelled_total", "evictions": 'deltaw_adapter_evictions_total{tier="active"}',
    "loads": 'deltaw_adapter_loads_total{result="done",tier="active"}',
    "failed_loads": 'deltaw_adapter_loads_total{result="failed",tier="active"}',
}  # fmt: skip


def process(pid: int) -> dict[str, float]:
    """Memory (MB of 2^20), threads, open files and processor seconds of a process."""
    folder = Path(f"/proc/{pid}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
    times = (folder / "stat").read_text().rpartition(")")[2].split()
    return {
        "rss_mb": round(int(status["VmRSS"].split()[0]) / 1024, 1),
        "anon_mb": round(int(status["RssAnon"].split()[0]) / 1024, 1),
        "threads": int(status["Threads"]),
        "files": len(list((folder / "fd").iterdir())),
        "cpu_s": (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),
    }


def metrics(url: str) -> dict[str, float]:
    """The server's /metrics by name with labels."""
    lines = [line.rsplit(" ", 1) for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines()]
    return {line[0]: float(line[1]) for line in lines if not line[0].startswith("#")}


async def rested(server: OwnServer) -> tuple[dict[str, Any], list[str]]:
    """The server at rest: its process and counters, and what it still holds though nobody asks."""
    until = time.monotonic() + REST_S
    while True:
        found = await asyncio.to_thread(metrics, server.url)
        held = [f"{name} {found[name]:g}" for name in HELD if found[name]]
        if not held or time.monotonic() > until:
            await asyncio.sleep(0.5)  # connections close
            return process(server.pid) | {short: found.get(name, 0) for short, name in COUNTED.items()}, held
        await asyncio.sleep(0.2)


async def soak(server: OwnServer, traffic: Traffic, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The samples, one at the end of each period, and what was held then."""
    samples: list[dict[str, Any]] = []
    leaks: list[str] = []
    began_cpu = process(server.pid)["cpu_s"]
    clock = traffic.clock

    async def bound() -> None:
        while True:
            await asyncio.sleep(0.1)
            used = process(server.pid)["cpu_s"] - began_cpu
            traffic.is_over = args.cores is not None and used > args.cores * clock.now() + 1

    beside = [asyncio.create_task(bound()), asyncio.create_task(clock.run())]
    seconds = args.minutes * 60
    while clock.now() < seconds:
        await traffic.period(min(60.0, seconds / 10), WORKERS)
        found, held = await rested(server)
        samples.append({"minute": round(clock.now() / 60, 2), **found})
        leaks += [f"minute {samples[-1]['minute']}: {what}" for what in held]
        told = {**samples[-1], "seen": dict(traffic.seen), "unexpected": len(traffic.unexpected), "held": held}
        with open(args.log, "a") as log:
            log.write(json.dumps(told) + "\n")
    for task in beside:
        task.cancel()
    return samples, leaks


def slope(samples: list[dict[str, Any]], what: str) -> float:
    """How much of `what` comes on in an hour: the median slope of all pairs of samples (Theil and Sen)."""
    pairs = combinations(samples, 2)
    return statistics.median((b[what] - a[what]) / (b["minute"] - a["minute"]) * 60 for a, b in pairs)


def judged(samples: list[dict[str, Any]], leaks: list[str], traffic: Traffic) -> dict[str, Any]:
    """What came out: `failures` says in words what is wrong; empty: nothing."""
    warm = samples[int(len(samples) * WARM) :]
    first, last = warm[: len(warm) // 3], warm[-(len(warm) // 3) :]
    grows = {what: round(slope(warm, what), 2) for what in ("rss_mb", "anon_mb", "threads", "files")}
    failures = [*leaks, *traffic.unexpected]
    rise = statistics.median(s["rss_mb"] for s in last) - statistics.median(s["rss_mb"] for s in first)
    if samples[-1]["failed_loads"]:
        failures.append(f"{samples[-1]['failed_loads']:g} loads of adapters failed")
    if samples[-1]["minute"] < SHORT:
        return {"per_hour": grows, "rise_mb": round(rise, 1), "failures": failures}
    if grows["rss_mb"] > MOST_MB_PER_HOUR and rise > MOST_MB_PER_HOUR / 4:
        failures.append(f"memory grows by {grows['rss_mb']} MB an hour")
    for what in ("threads", "files"):
        if min(s[what] for s in last) > max(s[what] for s in first):
            failures.append(f"{what}: from at most {max(s[what] for s in first)} to at least {last[-1][what]}")
    return {"per_hour": grows, "rise_mb": round(rise, 1), "failures": failures}


def main() -> None:
    """Make the adapters, run the server and the traffic, judge, print and append."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--minutes", type=float, default=60.0)
    p.add_argument("--cores", type=float, help="processor seconds a second that the server may use")
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--log", type=Path, default=Path(os.devnull), help="samples as they come, one JSON object a line")
    args = p.parse_args()
    about = identity("soak")
    with tempfile.TemporaryDirectory() as folder:
        registry, loose = Registry(Path(folder) / "registry", create=True), Path(folder) / "loose"
        fill(load_base(args.base, dtype="bfloat16"), registry, loose)
        key = secrets.token_urlsafe(24)
        own = ["--base", args.base, "--dtype", "bfloat16", "--registry", str(registry.root)]
        own += ["--adapter-root", str(loose), "--admin-key", key, "--kv-mb", "40", "--max-sequences", "16"]
        own += ["--max-queue", "8", "--adapters-mb", "40", "--host-mb", "60"]
        with own_server(own) as server:
            traffic = Traffic(server.url, key, registry, Clock(), random.Random(args.seed))
            samples, leaks = asyncio.run(soak(server, traffic, args))
    found = judged(samples, leaks, traffic)
    keys = ("minute", "rss_mb", "anon_mb", "threads", "files")
    kept = [[sample[key] for key in keys] for sample in samples]
    counts = {"answers": dict(traffic.seen), **{key: samples[-1][key] for key in (*COUNTED, "cpu_s")}}
    append(
        HERE / "results" / "soak.jsonl",
        {**about, "minutes": args.minutes, "cores": args.cores, **counts, **found, "keys": keys, "samples": kept},
    )
    print(json.dumps({**counts, **found, "first": samples[0], "last": samples[-1]}, indent=1))
    raise SystemExit(1 if found["failures"] else 0)


if __name__ == "__main__":
    main()
