"""Configurations drawn at random for bench_plan.py: bases, methods, formats, optimizers and sizes of steps.

A seed gives the same configurations everywhere. What the library refuses (the base itself trained in 4 bits, for one)
is not drawn.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from deltaw.plan.network import shapes

_LLAMA = shapes()["smollm2-135m"]
_QWEN = shapes()["qwen2.5-0.5b"] | {"vocab_size": 49152}  # the starter's tokenizer

DRAWN: dict[str, dict[str, Any]] = {
    "llama-wide": _LLAMA
    | {
        "hidden_size": 1280,
        "intermediate_size": 3456,
        "num_hidden_layers": 10,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-deep": _LLAMA
    | {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 44,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "qwen2-tied": _QWEN | {"num_hidden_layers": 12},
    "qwen2-untied": _QWEN
    | {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 10,
        "tie_word_embeddings": False,
    },
}
"""Shapes of bases that nothing was ever set on, with random weights."""

BASES = ("smollm2-135m-instruct", "smollm2-360m", "gpt2", *DRAWN)
METHODS = ("lora", "lora", "lora", "dora", "ia3", "vera", "houlsby", "prefix", "prompt", "full")
OPTIMIZERS: tuple[dict[str, Any], ...] = ({}, {}, {"paged": True}, {"bits": 8})
MOST_TOKENS = 4096


class Case(NamedTuple):
    """One configuration: the base's name and settings, the adapter, rows of `length` tokens of which the share
    `learned` are targets, and settings of the step."""

    name: str
    base: dict[str, Any]
    adapter: dict[str, Any]
    rows: int
    length: int
    learned: float
    step: dict[str, Any]

    @property
    def label(self) -> str:
        """The configuration in a line."""
        a = self.adapter
        words = [self.name, self.base.get("format", "dense"), self.base["dtype"], a["method"]]
        if "rank" in a:
            words += [f"r{a['rank']}", "qv" if "targets" in a else "all"]
        words.append(f"{self.rows}x{self.length}")
        for key, value in self.step.items():
            told = " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else value
            words.append(key if value is True else f"{key}={told}")
        return " ".join(words)


def draw(n: int, seed: int) -> list[Case]:
    """`n` different configurations."""
    rng = random.Random(seed)
    found: dict[str, Case] = {}
    while len(found) < n:
        case = _one(rng)
        found.setdefault(case.label, case)
    return list(found.values())


def _one(rng: random.Random) -> Case:
    name, method = rng.choice(BASES), rng.choice(METHODS)
    adapter = _adapter(rng, method, name)
    kept = rng.choice(({}, {}, {"format": "nf4"}, {"format": "nf4", "double_quant": True}, {"format": "int8"}))
    dtype = rng.choice(("bfloat16", "bfloat16", "float32"))
    if method == "full":
        kept, dtype = {}, "float32"
    length = rng.choice((64, 128, 256, 512, 1000))
    rows = rng.choice([r for r in (1, 2, 4, 8, 16) if 256 <= r * length <= MOST_TOKENS])
    step: dict[str, Any] = {"checkpointing": True} if rng.random() < 0.5 else {}
    if rows > 1 and rng.random() < 0.3:
        step["micro_tokens"] = rows * length // 2
    optimizer = rng.choice(OPTIMIZERS)
    if optimizer and method in ("lora", "dora", "houlsby", "full"):
        step["optimizer"] = optimizer
    return Case(name, kept | {"dtype": dtype}, adapter, rows, length, rng.choice((0.25, 0.5, 1.0)), step)


def _adapter(rng: random.Random, method: str, name: str) -> dict[str, Any]:
    if method in ("lora", "dora"):
        rank = rng.choice((4, 8, 16, 64))
        some = {} if name == "gpt2" or rng.random() < 0.6 else {"targets": ["q_proj", "v_proj"]}
        return {"method": method, "rank": rank, "alpha": 2 * rank, **some}
    return {"method": method}
