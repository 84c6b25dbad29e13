"""Which addresses only this machine reaches."""

from __future__ import annotations

import ipaddress
import os
import socket

from deltaw.errors import BadInput


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def refuse_taken(host: str, port: int) -> None:
    """Raise BadInput where a server cannot listen: told before a base is loaded for it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            if os.name == "posix":  # as the server does: not what still closes, but who listens is in its way
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except OSError as problem:
        raise BadInput(
            f"nothing can listen at {host}:{port}: {problem.strerror or problem}. Choose another with --port "
            "or --host; it may be a lab or a server that is open already."
        ) from None
