"""Which addresses only this machine reaches, and whether a server can listen there."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence

from deltaw.errors import ServeError


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(host: str, port: int) -> None:
    """Raise ServeError where no server can listen: an unknown host, a port that is in use or not for everybody."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server's own
            probe.bind(address)
    except OSError as error:
        raise ServeError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Choose another --host or --port."
        ) from None


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def hosts_of(host: str, more: Sequence[str], *, has_keys: bool) -> tuple[str, ...] | None:
    """The Host headers that a server takes: loopback's and `more`; None: any, with keys or from outside."""
    if has_keys or not is_loopback(host):
        return None
    return tuple(dict.fromkeys([*LOOPBACK, host.lower(), *(name.lower() for name in more)]))
