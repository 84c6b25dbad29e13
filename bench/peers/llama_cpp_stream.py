"""One stream of llama.cpp (llama-cpp-python) as a worker that a bench drives over stdin: bench_stream.py.

A step evaluates a prompt of random tokens and then decodes greedily, one token at a time, without a stop.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

from llama_cpp import Llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from workers import serve


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--gguf", required=True)
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--answer", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    model = Llama(args.gguf, n_ctx=2048, n_threads=args.threads, n_threads_batch=args.threads, verbose=False)
    draws = random.Random(0)

    def step() -> dict[str, float]:
        model.reset()
        start = time.perf_counter()
        model.eval([draws.randrange(100, 49000) for _ in range(args.prompt)])
        first = time.perf_counter()
        for _ in range(args.answer):
            model.eval([model.sample(temp=0.0)])
        return {"prompt_s": first - start, "decode_s": time.perf_counter() - first}

    serve(step)


if __name__ == "__main__":
    main()
