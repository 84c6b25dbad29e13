"""Traffic of every kind at random, for a while: nothing leaks, nothing fails that should not."""

from __future__ import annotations

import asyncio
import gc
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest
from made_servers import ADMIN, Made, Running, running, save_adapter

from deltaw.methods import Lora
from deltaw.serve.keys import hash_key
from deltaw.serve.settings import ServerSettings
from deltaw.store.registry import Registry

WORKERS = 8
FEWEST = 12  # whole answers, however slow the machine is
EXPECTED = {200, 404, 429, -1}  # a name that was unloaded, a full queue, a client that left


def rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


async def ask(client: httpx.AsyncClient, rng: random.Random, seen: Counter[int]) -> None:
    """One request: whole, streamed to its end, or left in the middle."""
    body = {"model": rng.choice(["tiny", "support", "support@2", "legal", "loose0", "small3", "small7", "small1"])}
    body |= {"prompt": "x" * rng.randint(1, 60), "max_tokens": rng.randint(1, 40), "seed": rng.randint(0, 9)}
    body |= {"n": rng.choice([1, 1, 1, 3]), "temperature": rng.choice([0, 1.3])}
    leaves = rng.random() < 0.3
    try:
        if rng.random() < 0.5:
            timeout = rng.uniform(0.005, 0.05) if leaves else 30
            seen[(await client.post("/v1/completions", json=body, timeout=timeout)).status_code] += 1
            return
        async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            pieces = 0
            async for _ in answer.aiter_lines():
                pieces += 1
                if leaves and pieces > 3:
                    break
            seen[answer.status_code] += 1
    except httpx.TimeoutException:
        seen[-1] += 1


async def change(client: httpx.AsyncClient, registry: Registry, rng: random.Random) -> None:
    """Promote, roll back, load or unload."""
    what = rng.randrange(4)
    if what == 0:
        await asyncio.to_thread(registry.promote, rng.choice(["support@1", "support@2"]))
    elif what == 1:
        await asyncio.to_thread(registry.promote, "support@1")
        await asyncio.to_thread(registry.promote, "support@2")
        await asyncio.to_thread(registry.rollback, "support")
    elif what == 2:
        load = {"lora_name": "loose0", "lora_path": rng.choice(["v1", "v2", "ia3"]), "load_inplace": True}
        assert (await client.post("/v1/load_lora_adapter", json=load)).status_code == 200
    else:
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "loose0"})
        assert gone.status_code in (200, 404)


async def soak(server: Running, registry: Registry, seconds: float) -> tuple[Counter[int], list[float]]:
    seen: Counter[int] = Counter()
    memory: list[float] = []
    until = time.monotonic() + seconds
    headers = {"Authorization": f"Bearer {ADMIN}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=60) as client:

        async def work(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < until or seen[200] < FEWEST:
                await (change(client, registry, rng) if number == 0 else ask(client, rng, seen))

        async def watch() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(seconds / 20)
                memory.append(rss_mb())

        await asyncio.gather(watch(), *(work(i) for i in range(WORKERS)))
    return seen, memory


@pytest.mark.parametrize("seconds", [4.0, pytest.param(900.0, marks=pytest.mark.slow)])
def test_serve_http_soak_leaves_nothing_behind(made, tmp_path, seconds):
    shutil.copytree(made.registry, tmp_path / "registry")
    own = Made(made.base, tmp_path / "registry", made.loose, made.foreign)
    registry = Registry(own.registry)
    for i in range(8):
        registry.add(f"small{i}", save_adapter(own.base, tmp_path / f"small{i}", Lora(rank=2, alpha=3), seed=40 + i))
    settings = ServerSettings(
        max_sequences=12, max_queue=4, admin_sha256=hash_key(ADMIN), adapter_roots=(made.loose.resolve(),)
    )
    with running(own, settings, kv_mb=1, active_bytes=40_000, host_bytes=60_000) as server:
        seen, memory = asyncio.run(soak(server, registry, seconds))
        assert set(seen) <= EXPECTED, seen
        assert seen[200] >= FEWEST
        assert server.idle(20)
        stats = server.served.engine.stats()
        assert (stats.kv_bytes_used, stats.running, stats.waiting) == (0, 0, 0)
        residency = server.served.residency
        assert set(server.served.engine.names()) == set(residency.active.items)
        assert residency.active.bytes <= 40_000
        assert residency.active.evictions > 0
        assert not server.app.state.serving.admission.sequences
        gc.collect()
        assert not server.app.state.serving.running
        if seconds > 100:  # a short run is still filling caches
            assert max(memory[10:]) - memory[5] < 60, memory
