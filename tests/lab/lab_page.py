"""A page of the lab in Chromium as tests use it, and a server under it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import axe_playwright_python
import uvicorn
from fastapi import FastAPI

AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
READY = "body[aria-busy=false]"
PATIENCE_MS = 90_000  # a busy machine is slow, not wrong


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address at which `app` answers, as `deltaw lab` serves it, on a port that was free."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


class Page:
    """A page of the lab, and what went wrong on it."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.page = browser.new_context(**{"viewport": {"width": 1180, "height": 900}, **context}).new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.url = url
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", lambda r: self.wrong.append(r.url) if not r.url.startswith((url, "data:")) else None)

    def open(self, address: str) -> None:
        """Go to a picture's address; on the page already, as its links do."""
        self.page.goto(f"{self.url}/#{address}")
        self.page.wait_for_selector("#numbers dd")
        self.ready()

    def ready(self) -> None:
        """Wait until what was asked is drawn."""
        self.page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
        self.page.wait_for_selector(READY)

    def numbers(self) -> dict[str, str]:
        """The numbers shown, by key."""
        return dict(
            self.page.evaluate(
                "[...document.querySelectorAll('#numbers > div')].map((b) => [b.dataset.key, b.lastChild.innerText])"
            )
        )

    def seen(self) -> tuple[Any, ...]:
        """Everything that is drawn: numbers, text and shapes, pixels."""
        pixels = self.page.evaluate("[...document.querySelectorAll('canvas')].map((c) => c.toDataURL()).join()")
        return self.numbers(), self.page.inner_html("#drawing"), pixels

    def barriers(self) -> list[tuple[str, list[Any]]]:
        """What axe calls serious or critical on the page as it stands; the context must bypass the page's policy."""
        if not self.page.evaluate("'axe' in window"):
            self.page.add_script_tag(path=str(AXE))
        found = self.page.evaluate("axe.run({resultTypes: ['violations']}).then((r) => r.violations)")
        return [
            (v["id"], [n["target"] for n in v["nodes"]][:3]) for v in found if v["impact"] in ("serious", "critical")
        ]

    def close(self) -> None:
        self.page.context.close()
