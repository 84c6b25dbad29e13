"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServerSettings:
    """Limits and keys of a server. Every limit is refused with a sentence, never cut.

    max_body_bytes     of one request
    max_prompt_tokens, max_output_tokens   of one sequence; None: what the base has positions for
    max_sequences      that are computed at once; `max_queue` more may wait, then 429 with Retry-After
    max_choices        sequences of one request: prompts times n
    max_schema_bytes   of a JSON schema that answers shall obey
    max_connections    open at once; more are closed at once
    header_s, body_s   a client has so long to send its headers, and its body
    send_s             a client that takes no byte for so long is let go
    drain_s            after SIGTERM, requests that run have so long to end
    keys_file          who may use the server (deltaw keys); None: anyone who reaches it
    admin_sha256       SHA-256 (hex) of the key for loading and unloading; None: these routes are not there
    hosts              what the Host header may name, without port; None: anything. Where no key is asked for, this
                       keeps web pages from reaching a server on loopback under a name of theirs (DNS rebinding)
    adapter_roots      folders from which adapters may be loaded by request
    """

    max_body_bytes: int = 2 * 2**20
    max_prompt_tokens: int | None = None
    max_output_tokens: int | None = None
    max_sequences: int = 256
    max_queue: int = 256
    max_choices: int = 64
    max_schema_bytes: int = 64 * 2**10
    max_connections: int = 1024
    header_s: float = 10.0
    body_s: float = 30.0
    send_s: float = 60.0
    drain_s: float = 30.0
    keys_file: Path | None = None
    admin_sha256: str | None = None
    hosts: tuple[str, ...] | None = None
    adapter_roots: tuple[Path, ...] = ()
