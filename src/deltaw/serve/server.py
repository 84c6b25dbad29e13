"""A server process: connections with deadlines, and an end that lets running requests finish."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from deltaw.serve.hosts import is_loopback
from deltaw.serve.serving import LOG, Serving

_SWITCH_S = 0.0005  # Python's own 5 ms are a fifth of a step, which the engine would wait behind events and adapters
_LOOK_S = 0.02  # between looks at what still runs
_LAST_S = 5.0  # for requests that are ended to go


class TimedProtocol(H11Protocol):
    """HTTP/1.1 whose clients must send their headers within `header_s`, and of whom there are at most so many.

    uvicorn waits for headers as long as a client likes: a few hundred silent connections would be all it can hold.
    """

    def __init__(self, *args: Any, header_s: float, max_connections: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_s, self._max_connections = header_s, max_connections
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers, or close at once where there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
        else:
            self._deadline = self.loop.call_later(self._header_s, self._too_slow)

    def data_received(self, data: bytes) -> None:
        """Headers that are whole end the wait; a next request's begin it again."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self._header_s, self._too_slow)

    def on_response_complete(self) -> None:
        """uvicorn's keep-alive limit counts from here, until the first byte of the next request."""
        self._stop_waiting()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: /ready says 503, new requests get 503, running ones end; a second signal ends at once."""

    def __init__(self, config: uvicorn.Config, serving: Serving) -> None:
        super().__init__(config)
        self.serving = serving
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn's, and remember the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets=sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.serving.admission.is_draining or self._loop is None:
            self.should_exit = self.force_exit = True
            return
        self.serving.admission.is_draining = True
        LOG.info("draining", extra={"told": {"signal": signal.Signals(sig).name}})
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._task = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        until = time.monotonic() + self.serving.settings.drain_s
        while self.serving.admission.sequences and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        for generation in list(self.serving.running):
            generation.cancel()  # their clients are told
        until = time.monotonic() + _LAST_S
        while self.serving.admission.sequences and time.monotonic() < until:
            await asyncio.sleep(_LOOK_S)
        self.should_exit = True


def make_server(app: FastAPI, host: str, port: int) -> DrainingServer:
    """A server of `app`, which listens when it runs. Its `run()` returns after a drain."""
    serving: Serving = app.state.serving
    limits = {"header_s": serving.settings.header_s, "max_connections": serving.settings.max_connections}
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=partial(TimedProtocol, **limits),  # type: ignore[arg-type]
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
    )
    return DrainingServer(config, serving)


def greeting(host: str, port: int, serving: Serving) -> list[str]:
    """What a server says as it starts: who can reach it, and where."""
    lines, name = [], serving.served.base_name
    if not is_loopback(host):
        keyed = "with a key" if serving.keys is not None else "WITHOUT A KEY: give --api-keys, or use 127.0.0.1"
        lines.append(f"listening on {host}: whoever reaches this machine can use the server {keyed}")
    if serving.served.hides:
        lines.append(
            f"the registry's adapter {name!r} cannot be asked for: the base has that name. Give it another, --name"
        )
    shown = f"[{host}]" if ":" in host else host
    return [*lines, f"serving {name} at http://{shown}:{port}/v1"]


def run_server(server: DrainingServer, say: Callable[[str], None]) -> None:
    """Serve until a signal; then the engine lets go of what is left, and threads end."""
    serving = server.serving
    for line in greeting(server.config.host, server.config.port, serving):
        say(line)
    sys.setswitchinterval(_SWITCH_S)
    try:
        server.run()
    finally:
        serving.served.engine.close(0.0)
        serving.served.close()
        serving.close()
