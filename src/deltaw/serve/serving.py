"""What the routes share: the served models, limits, keys, metrics, and the bridge to the engine."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakSet

from deltaw.serve.bridge import Bridge, Generation
from deltaw.serve.keys import KeyFile
from deltaw.serve.limits import Admission
from deltaw.serve.metrics import Metrics
from deltaw.serve.served import Served
from deltaw.serve.settings import ServerSettings

LOG = logging.getLogger("deltaw.serve")


class Serving:
    """One server's state. Made before the loop runs; what belongs to a loop is made on first use."""

    def __init__(self, served: Served, settings: ServerSettings) -> None:
        self.served, self.settings = served, settings
        self.admission = Admission(settings)
        self.metrics = Metrics()
        self.metrics.watch(self)
        self.keys = None if settings.keys_file is None else KeyFile(settings.keys_file)
        self.running: WeakSet[Generation] = WeakSet()
        self._bridge: Bridge | None = None
        self._text = ThreadPoolExecutor(1, "deltaw-text")

    @property
    def bridge(self) -> Bridge:
        """Made on first use, on the event loop."""
        if self._bridge is None:
            self._bridge = Bridge()
        return self._bridge

    async def in_text_thread(self, work: Any) -> Any:
        """Run tokenizing beside the loop: a long prompt stalls nobody."""
        return await asyncio.get_running_loop().run_in_executor(self._text, work)

    def close(self) -> None:
        """End the threads."""
        self._text.shutdown(wait=True, cancel_futures=True)
