"""Who gets in: a bounded queue for all, a bound for each key."""

from __future__ import annotations

import math
from collections import Counter

from deltaw.serve.keys import Key
from deltaw.serve.refuse import refused
from deltaw.serve.settings import ServerSettings

_SMOOTH = 0.1  # weight of the newest request in the mean duration


class Place:
    """Room for the sequences of one request; `release` gives it back, once."""

    def __init__(self, admission: Admission, key: Key | None, n: int) -> None:
        self._admission, self._key, self._n = admission, key, n

    def release(self, took_s: float | None = None) -> None:
        """Give the room back. took_s: how long the request was in, for Retry-After."""
        if self._n:
            self._admission._leave(self._key, self._n, took_s)
            self._n = 0


class Admission:
    """Counts what is in the server. Used from the event loop alone."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.sequences = 0
        self.is_draining = False
        self._of_key: Counter[str] = Counter()
        self._mean_s = 1.0

    @property
    def capacity(self) -> int:
        """Sequences that are in or may wait."""
        return self.settings.max_sequences + self.settings.max_queue

    def enter(self, key: Key | None, n: int) -> Place:
        """Room for `n` sequences. Raises the refusals 429 (with Retry-After), 503 while draining, 400 for too many."""
        if self.is_draining:
            raise refused(503, "The server is shutting down.", "draining", headers={"Retry-After": "5"})
        most = min(self.settings.max_choices, self.capacity)
        if n > most:
            raise refused(400, f"{n} sequences in one request; at most {most} (prompts times n).", "too_many", "n")
        if key is not None and key.max_concurrent is not None and self._of_key[key.name] >= key.max_concurrent:
            message = f"This key has {key.max_concurrent} requests open, as many as it may have at once."
            raise refused(429, message, "key_limit", headers={"Retry-After": self._retry_s(0)})
        if self.sequences + n > self.capacity:
            message = f"The queue is full: {self.sequences} sequences are in, {self.capacity} are the most."
            raise refused(429, message, "queue_full", headers={"Retry-After": self._retry_s(n)})
        self.sequences += n
        if key is not None:
            self._of_key[key.name] += 1
        return Place(self, key, n)

    def _leave(self, key: Key | None, n: int, took_s: float | None) -> None:
        self.sequences -= n
        if key is not None:
            self._of_key[key.name] -= 1
            self._of_key += Counter()  # forget zeros
        if took_s is not None:
            self._mean_s += _SMOOTH * (took_s - self._mean_s)

    def _retry_s(self, n: int) -> str:
        """Seconds until `n` sequences may have room, from the mean duration."""
        each_s = self._mean_s / max(self.settings.max_sequences, 1)
        return str(min(60, max(1, math.ceil(each_s * n))))
