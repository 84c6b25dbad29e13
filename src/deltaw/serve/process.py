"""A server in a process of its own, for as long as it is needed."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

import httpx

from deltaw.errors import WorkFailed

READY_S = 600.0
END_S = 20.0
_LAST = 2000  # characters of its log in a message


class OwnServer(NamedTuple):
    """Where it answers, and the id of its process."""

    url: str
    pid: int


@contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[OwnServer]:
    """Run `deltaw serve` with `arguments` on a free port of loopback, until the block ends; it is ready then.

    Raises WorkFailed with the end of its log when it does not come up.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-c", "from deltaw.cli.main import main; main()", "serve"]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([*program, *arguments, "--port", str(port)], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield OwnServer(url, process.pid)
        finally:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: IO[str]) -> None:
    until = time.monotonic() + READY_S
    while process.poll() is None and time.monotonic() < until:
        try:
            if httpx.get(f"{url}/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    log.seek(0)
    raise WorkFailed(f"The server did not come up:\n{log.read()[-_LAST:].strip()}")
