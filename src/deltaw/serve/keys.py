"""API keys: who may ask, for which models, how much at once. Only hashes are kept.

    {"keys": [{"name": "support-team", "sha256": "...", "models": ["*"], "max_concurrent": null}]}

A key is 32 random bytes, so its plain SHA-256 cannot be turned back; nothing slow is needed.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deltaw.errors import NotFound, ServeError

PREFIX = "dw-"
MIN_ADMIN = 20  # letters of an admin key
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Key:
    """One key.

    models          names (of the base, of adapters in all versions) that it may use; "*": all
    max_concurrent  requests that it may have open at once; None: any number
    """

    name: str
    sha256: str
    models: tuple[str, ...] = ("*",)
    max_concurrent: int | None = None

    def allows(self, model: str) -> bool:
        """Whether it may use a model by its name without version."""
        return "*" in self.models or model in self.models


def hash_key(secret: str) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def is_key(secret: str, sha256: str) -> bool:
    """Whether `secret` has this hash; takes the same time whatever differs."""
    return hmac.compare_digest(hash_key(secret), sha256)


def hash_admin_key(secret: str) -> str:
    """The hash of an admin key. Raises ServeError for one that could be guessed."""
    if len(secret) < MIN_ADMIN:
        raise ServeError(
            f"The admin key has {len(secret)} letters; {MIN_ADMIN} or more are needed. "
            "Make one: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return hash_key(secret)


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys in a file. Raises NotFound, ServeError that says what is wrong with it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"No key file {path}. `deltaw keys add NAME --file {path}` makes one.") from None
    except (OSError, ValueError) as problem:
        raise ServeError(f"The key file {path} cannot be read: {problem}") from None
    if not isinstance(found, dict) or set(found) != {"keys"} or not isinstance(found["keys"], list):
        raise ServeError(f'The key file {path} is not {{"keys": [...]}}.')
    keys = tuple(_key(entry, f"{path}: keys[{i}]") for i, entry in enumerate(found["keys"]))
    if len({key.name for key in keys}) < len(keys):
        raise ServeError(f"The key file {path} has a name twice.")
    return keys


def _key(entry: Any, where: str) -> Key:
    known = {"name", "sha256", "models", "max_concurrent"}
    if not isinstance(entry, dict) or not {"name", "sha256"} <= set(entry) <= known:
        raise ServeError(f"{where} needs name and sha256, and may have models and max_concurrent, nothing else.")
    name, digest = entry["name"], entry["sha256"]
    models, most = entry.get("models", ["*"]), entry.get("max_concurrent")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ServeError(f"{where}: name is letters, digits, '.', '-', '_' (at most 64), not {name!r}.")
    if not isinstance(digest, str) or not _HASH.fullmatch(digest):
        raise ServeError(f"{where}: sha256 is 64 hex digits in lower case; never write the key itself there.")
    if not isinstance(models, list) or not models or not all(isinstance(m, str) and m for m in models):
        raise ServeError(f'{where}: models is a list of names, or ["*"].')
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ServeError(f"{where}: max_concurrent is a number from 1 up, or null.")
    return Key(name, digest, tuple(models), most)


def add_key(
    path: Path, name: str, models: tuple[str, ...] = ("*",), max_concurrent: int | None = None
) -> tuple[Key, str]:
    """Make a key and keep its hash in the file. Returns (Key, the secret, which is nowhere else).

    Raises ServeError for a name that is taken or cannot be one.
    """
    keys = read_keys(path) if path.exists() else ()
    if any(key.name == name for key in keys):
        raise ServeError(f"{path} has a key called {name!r} already. Remove it first, or choose another name.")
    secret = PREFIX + secrets.token_urlsafe(32)
    made = {"name": name, "sha256": hash_key(secret), "models": list(models), "max_concurrent": max_concurrent}
    key = _key(made, "the new key")
    _write(path, (*keys, key))
    return key, secret


def remove_key(path: Path, name: str) -> None:
    """Forget a key; a running server sees it at the next request. Raises NotFound."""
    keys = read_keys(path)
    kept = tuple(key for key in keys if key.name != name)
    if len(kept) == len(keys):
        raise NotFound(f"{path} has no key called {name!r}; it has {', '.join(k.name for k in keys) or 'none'}.")
    _write(path, kept)


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    text = json.dumps({"keys": [asdict(key) for key in keys]}, indent=1) + "\n"
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # readable by its owner alone
    with open(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(aside, path)


class KeyFile:
    """The keys of a file, read again when the file changes. A file that broke since keeps the keys it had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self._stamp = self._now()
        self._keys = read_keys(path)

    def _now(self) -> tuple[int, int, int]:
        found = self.path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def find(self, secret: str) -> Key | None:
        """The key with this secret. All are compared, each in constant time."""
        self._refresh()
        digest, hit = hash_key(secret), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.sha256):
                hit = key
        return hit

    def _refresh(self) -> None:
        try:
            if (stamp := self._now()) != self._stamp:
                self._keys, self._stamp, self.problem = read_keys(self.path), stamp, None
        except (OSError, ServeError, NotFound) as problem:
            self.problem = str(problem)
