"""One stream of deltaw's engine as a worker that a bench drives over stdin: bench_stream.py."""

from __future__ import annotations

import argparse
import threading
import time

import torch

from deltaw.model.base import load_base
from deltaw.serve.engine import Engine
from deltaw.serve.types import Output, Request, Sampling
from workers import serve


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--base", required=True)
    p.add_argument("--format", default="dense")
    p.add_argument("--prompt", type=int, default=64)
    p.add_argument("--answer", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = load_base(args.base, args.format, "bfloat16", double_quant=args.format != "dense")
    engine = Engine(model, kv_bytes=1 << 28)
    rng = torch.Generator().manual_seed(0)
    how = Sampling(max_tokens=args.answer + 1, temperature=0.0, ignore_eos=True)

    def step() -> dict[str, float]:
        prompt = tuple(torch.randint(100, 49000, (args.prompt,), generator=rng).tolist())
        times: list[float] = []
        over = threading.Event()

        def hear(output: Output) -> None:
            times.append(time.perf_counter())
            if output.finished is not None:
                over.set()

        start = time.perf_counter()
        engine.submit(Request("one", prompt, how), hear)
        over.wait()
        return {"prompt_s": times[0] - start, "decode_s": times[-1] - times[0]}

    serve(step)


if __name__ == "__main__":
    main()
