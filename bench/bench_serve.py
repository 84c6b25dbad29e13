"""How many tokens a second does the engine make, on the base alone and over adapters in one batch?

What would change our mind: mixed adapters below 90 % of the base alone (issue 7), or below 15 times vLLM's CPU build.

    .venv/bin/python bench/bench_serve.py --runner generic|fast [--rounds 3] [--cases base,lora,...]

The starter in bfloat16; requests of random tokens, greedy, that ignore end tokens, all sent at once. Each round runs
every case once, in turn, and the row holds the median. Adapters are random LoRA of rank 16 on all linear maps.
Prefixes share nothing: each round's prompts are new. Appends a row to bench/results/serve.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from dataclasses import dataclass
from typing import Any

import torch

import deltaw
from deltaw.core.adapter import Adapter
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.serve.engine import Engine
from deltaw.serve.pages import Pages
from deltaw.serve.runner import GenericRunner, Runner
from deltaw.serve.types import Output, Request, Sampling
from workers import HERE, append, identity

LORA = deltaw.Lora(rank=16, alpha=32, targets="all-linear")
METHODS: list[Any] = [
    LORA, deltaw.Dora(rank=16, alpha=32), deltaw.Ia3(), deltaw.Vera(rank=256), deltaw.BitFit(add=True),
    deltaw.Houlsby(bottleneck=64), deltaw.Prompt(n_tokens=16, start="random"),
    deltaw.PrefixTuning(n_tokens=16, projection=False),
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Requests sent at once: how many, over how many adapters, with how long a prompt and answer."""

    n: int
    adapters: int = 0
    methods: bool = False
    prompt: int = 64
    answer: int = 64


CASES = {
    "base": Case(48),
    "lora": Case(48, 8),
    "one_lora": Case(48, 1),
    "many_lora": Case(48, 64),
    "methods": Case(48, 8, methods=True),
    "stream": Case(1),
    "stream_lora": Case(1, 1),
    "prefill": Case(1, prompt=1024, answer=1),
}


def adapter(model: Model, spec: Any, seed: int) -> Adapter:
    """A finished adapter with noise in every tensor that trains."""
    rng = torch.Generator().manual_seed(seed)
    model.attach(spec)
    with torch.no_grad():
        for value in model.adapters["default"].parameters().values():
            value += 0.02 * torch.randn(value.shape, generator=rng)
    made = model.adapter()
    model.detach()
    return made


def runner(name: str, model: Model, pages: Pages) -> Runner:
    """The runner called `name`."""
    if name == "generic":
        return GenericRunner(model, pages)
    from deltaw.serve.fast import FastRunner

    return FastRunner(model, pages)


def run(engine: Engine, case: Case, seed: int) -> dict[str, float]:
    """Seconds for all requests, of the CPU too, and until the first token of the last request to get one."""
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(100, 49000, (case.n, case.prompt), generator=rng).tolist()
    left, over, first = [case.n], threading.Event(), {}
    start, busy = time.perf_counter(), time.process_time()

    def listener(i: int) -> Any:
        def hear(output: Output) -> None:
            first.setdefault(i, time.perf_counter() - start)
            if output.finished is not None:
                assert output.finished == "length", output.error
                left[0] -= 1
                if not left[0]:
                    over.set()

        return hear

    how = Sampling(max_tokens=case.answer, temperature=0.0, ignore_eos=True)
    for i, prompt in enumerate(prompts):
        name = None if not case.adapters else f"{'method' if case.methods else 'lora'}{i % case.adapters}"
        engine.submit(Request(str(i), tuple(prompt), how, name), listener(i))
    over.wait()
    seconds = time.perf_counter() - start
    made = case.n * case.answer
    found = {"seconds": seconds, "tokens_per_s": made / seconds, "first_token_s": max(first.values())}
    found["cpu_s"] = time.process_time() - busy
    if case.answer == 1:
        found["prompt_tokens_per_s"] = case.n * case.prompt / seconds
    return found


def main() -> None:
    """Load, warm up, run the cases in turn, print and append."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runner", choices=["generic", "fast"], default="generic")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--base", default="smollm2-135m-instruct")
    args = parser.parse_args()
    cases = {name: CASES[name] for name in args.cases.split(",")}
    model = load_base(args.base, dtype="bfloat16")
    most = max((c.adapters for c in cases.values() if not c.methods), default=0)
    adapters = {f"lora{i}": adapter(model, LORA, i) for i in range(most)}
    if any(c.methods for c in cases.values()):
        adapters |= {f"method{i}": adapter(model, spec, i) for i, spec in enumerate(METHODS)}
    engine = Engine(model, kv_bytes=1 << 30, make_runner=lambda m, p: runner(args.runner, m, p))
    for name, made in adapters.items():
        engine.load(name, made)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(args.rounds + 1):  # the first warms up
        for name, case in cases.items():
            found = run(engine, case, 1000 * number + len(name))
            if number:
                rounds[name].append(found)
    engine.close()
    medians = {n: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for n, rows in rounds.items()}
    for name, found in medians.items():
        print(f"{name:12} " + "  ".join(f"{k} {v:.3f}" for k, v in found.items()))
    append(
        HERE / "results" / "serve.jsonl",
        {**identity("serve"), "runner": args.runner, "rounds": args.rounds, "cases": medians},
    )


if __name__ == "__main__":
    main()
