"""What every tool of bench_serve_peers.py is asked: cases, and the figures of one. Standard library only."""

from __future__ import annotations

import argparse
import random
from typing import NamedTuple

Ids = list[list[int]]


class Case(NamedTuple):
    """`n` requests at once over `adapters` adapters (request i has adapter i mod adapters; 0: the base alone)."""

    n: int
    adapters: int
    prompt: int
    answer: int

    def prompts(self, draws: random.Random) -> Ids:
        """Random token ids, which no prefix can answer."""
        return [[draws.randrange(100, 49000) for _ in range(self.prompt)] for _ in range(self.n)]

    def figures(self, seconds: float, **more: float) -> dict[str, float]:
        """Of one run of it: output tokens a second over all the time; of a prefill prompt tokens."""
        tokens = self.n * (self.prompt if self.answer == 1 else self.answer)
        return {"seconds": round(seconds, 4), "tokens_per_s": round(tokens / seconds, 2), **more}


def case(text: str) -> tuple[str, Case]:
    """NAME=N:ADAPTERS:PROMPT:ANSWER."""
    name, _, numbers = text.partition("=")
    return name, Case(*(int(number) for number in numbers.split(":")))


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options that every worker has."""
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--adapter", action="append", default=[], help="folder of an adapter; repeatable")
    p.add_argument("--case", action="append", type=case, default=[], help="NAME=N:ADAPTERS:PROMPT:ANSWER; repeatable")
    p.add_argument("--threads", type=int, default=2)
    return p
