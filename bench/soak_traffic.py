"""What soak_serve.py does to a server: requests of every kind, clients that leave, adapters that change."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.model.model import Model
from deltaw.store.registry import Registry

TICK_S, STALL_S = 0.5, 3.0
SMALL = 12
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
OPENINGS = [f"Letter {i}. Dear neighbours, the road in front of house {i} will be closed " * 2 for i in range(6)]
REFUSED = [
    ({"model": "nobody"}, 404), ({"prompt": []}, 400), ({"max_tokens": 10**6}, 400), ({"tools": [{"type": "x"}]}, 400),
    ({"top_p": 2}, 400), ({"prompt": "word " * 9000}, 400), ({"unknown": 1}, 400),
]  # fmt: skip
GONE = "left"


def noisy(model: Model, spec: Any, seed: int) -> Adapter:
    """A finished adapter with small noise in everything that trains; the model is bare again."""
    model.attach(spec, seed=seed)
    for value in model.trainable().values():
        value.data.normal_(std=0.02)
    made = model.adapter()
    model.detach()
    return made


def fill(model: Model, registry: Registry, loose: Path) -> None:
    """Adapters of several methods and sizes in the registry, and two in folders for the admin's routes."""
    specs: dict[str, list[Any]] = {
        "support": [deltaw.Lora(rank=16, alpha=32, targets="all-linear"), deltaw.Lora(rank=8, alpha=8)],
        "legal": [deltaw.Dora(rank=8, alpha=16), deltaw.Houlsby(bottleneck=16)],
        "terse": [deltaw.Ia3(), deltaw.Prompt(n_tokens=8, start="random")],
    }
    specs |= {f"small{i}": [deltaw.Lora(rank=4, alpha=8, targets=["q_proj", "v_proj"])] for i in range(SMALL)}
    seed = 0
    for name, of_name in specs.items():
        for spec in of_name:
            registry.add(name, noisy(model, spec, seed := seed + 1))
    for number, spec in enumerate((deltaw.Lora(rank=4, alpha=4), deltaw.BitFit(add=True))):
        noisy(model, spec, 100 + number).save(loose / f"v{number}")


class Clock:
    """Seconds that this process ran: where it was stopped (SIGSTOP) for a while, that does not count."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._stalled = 0.0
        self.last_stall = -1.0

    def now(self) -> float:
        """Seconds since it was made, without stalls."""
        return time.monotonic() - self._began - self._stalled

    async def run(self) -> None:
        """Look for stalls, until cancelled."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK_S)
            gap = time.monotonic() - before
            if gap > STALL_S:
                self._stalled += gap - TICK_S
                self.last_stall = time.monotonic()


@dataclass
class Traffic:
    """Traffic for one server.

    seen      answers by status, and clients that left; unexpected: what should not have been (the first hundred)
    is_over   whether the server's processor time is beyond its share: then no new request begins
    """

    url: str
    admin_key: str
    registry: Registry
    clock: Clock
    rng: random.Random
    seen: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    is_over: bool = False

    async def period(self, seconds: float, workers: int) -> None:
        """Traffic for so long; at its end every request has ended and every connection is closed."""
        until = self.clock.now() + seconds
        headers = {"Authorization": f"Bearer {self.admin_key}"}
        limits = httpx.Limits(max_connections=workers + 1)
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=120, limits=limits) as client:

            async def work(number: int) -> None:
                while self.clock.now() < until:
                    if self.is_over:
                        await asyncio.sleep(0.05)
                    elif number == 0:
                        await self._guarded(self._change(client))
                        await asyncio.sleep(self.rng.uniform(0, 1))
                    else:
                        await self._guarded(self._ask(client))

            await asyncio.gather(*(work(i) for i in range(workers)))

    async def _guarded(self, work: Any) -> None:
        """Do it; note what should not have been, unless this process was stopped meanwhile."""
        began = time.monotonic()
        try:
            await work
        except (httpx.HTTPError, AssertionError) as problem:
            await asyncio.sleep(2 * TICK_S)  # the clock notices
            if self.clock.last_stall > began:
                self.seen["stalled"] += 1
            elif len(self.unexpected) < 100:
                self.unexpected.append(f"{type(problem).__name__}: {problem}")

    async def _ask(self, client: httpx.AsyncClient) -> None:
        """One request: refused, left in the middle, whole, or streamed to its end."""
        chance = self.rng.random()
        if chance < 0.1:
            more, status = self.rng.choice(REFUSED)
            answer = await client.post("/v1/completions", json={"model": "", "prompt": "x", **more})
            self._note(answer.status_code, {status})
            return
        path, body = self._body()
        leaves = chance < 0.4
        allowed = {200, 404, 429} if body["model"] == "loose" else {200, 429}
        if self.rng.random() < 0.4:
            timeout = self.rng.uniform(0.01, 0.3) if leaves else 120
            try:
                self._note((await client.post(path, json=body, timeout=timeout)).status_code, allowed)
            except httpx.TimeoutException:
                assert leaves, "no answer in 120 s"
                self.seen[GONE] += 1
            return
        async with client.stream("POST", path, json={**body, "stream": True}) as answer:
            last, pieces = "", 0
            async for line in answer.aiter_lines():
                last, pieces = line or last, pieces + 1
                if leaves and pieces > 6:
                    self.seen[GONE] += 1
                    return
            self._note(answer.status_code, allowed)
            assert answer.status_code != 200 or last == "data: [DONE]", last

    def _body(self) -> tuple[str, dict[str, Any]]:
        rng = self.rng
        names = ["", "support", "support@1", "legal", "legal@2", "terse", "loose", f"small{rng.randrange(SMALL)}"]
        text = rng.choice(OPENINGS) + " ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(40)))
        body: dict[str, Any] = {"model": rng.choice(names), "max_tokens": rng.randint(1, 48), "seed": rng.randrange(9)}
        body |= {"n": rng.choice([1, 1, 1, 3]), "temperature": rng.choice([0, 0.7, 1.3]), "ignore_eos": True}
        body |= rng.choice([{}, {}, {"top_p": 0.9}, {"stop": ["the", "\n"]}, {"frequency_penalty": 0.5}])
        if rng.random() < 0.1:
            wanted = {"name": "place", "schema": SCHEMA}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        if rng.random() < 0.4:
            body |= {"messages": [{"role": "user", "content": text}], "logprobs": rng.random() < 0.3}
            return "/v1/chat/completions", body
        return "/v1/completions", {**body, "prompt": text}

    async def _change(self, client: httpx.AsyncClient) -> None:
        """Promote, roll back, load or unload."""
        what, name = self.rng.randrange(4), self.rng.choice(["support", "legal", "terse"])
        if what == 0:
            await asyncio.to_thread(self.registry.promote, f"{name}@{self.rng.choice((1, 2))}")
        elif what == 1:
            await asyncio.to_thread(self.registry.promote, f"{name}@1")
            await asyncio.to_thread(self.registry.promote, f"{name}@2")
            await asyncio.to_thread(self.registry.rollback, name)
        elif what == 2:
            load = {"lora_name": "loose", "lora_path": self.rng.choice(["v0", "v1"]), "load_inplace": True}
            self._note((await client.post("/v1/load_lora_adapter", json=load)).status_code, {200})
        else:
            gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "loose"})
            self._note(gone.status_code, {200, 404})

    def _note(self, status: int, allowed: set[int]) -> None:
        self.seen[str(status)] += 1
        assert status in allowed, f"status {status} instead of {sorted(allowed)}"
