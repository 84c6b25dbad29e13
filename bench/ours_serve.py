"""deltaw's engine as a worker that runs serving cases: bench_serve_peers.py. One step runs all of them in turn."""

from __future__ import annotations

import random
import threading
import time

import torch

from deltaw.model.base import load_base
from deltaw.serve.engine import Engine
from deltaw.serve.types import Output, Request, Sampling
from serving_cases import Case, parser
from workers import serve


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--format", default="dense")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model = load_base(args.base, args.format, "bfloat16", double_quant=args.format != "dense")
    engine = Engine(model, kv_bytes=1 << 30)
    for number, folder in enumerate(args.adapter):
        engine.load(str(number), folder)
    draws = random.Random(0)

    def run(case: Case) -> dict[str, float]:
        left, over = [case.n], threading.Event()

        def hear(output: Output) -> None:
            if output.finished is not None:
                assert output.finished == "length", output.error
                left[0] -= 1
                if not left[0]:
                    over.set()

        how = Sampling(max_tokens=case.answer, temperature=0.0, ignore_eos=True)
        prompts = case.prompts(draws)
        start = time.perf_counter()
        for i, prompt in enumerate(prompts):
            name = str(i % case.adapters) if case.adapters else None
            engine.submit(Request(str(i), tuple(prompt), how, name), hear)
        over.wait()
        return case.figures(time.perf_counter() - start)

    serve(lambda: {name: run(case) for name, case in args.case})


if __name__ == "__main__":
    main()
