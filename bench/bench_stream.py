"""Is one stream of our server faster than llama.cpp's on the same machine?

What would change our mind: less than llama.cpp's tokens a second in 4 bits, or prompts less than four times as fast.

    .venv/bin/python bench/bench_stream.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--llama-path DIR] [--steps 5]

A prompt of random tokens, then greedy tokens one at a time, as workers that step in turn: ours in bfloat16 and in nf4,
llama.cpp (llama-cpp-python) on the starter's own GGUF. --llama-path is where llama_cpp is, if not installed here.
Appends a row to bench/results/stream.jsonl.
"""

from __future__ import annotations

import argparse
from functools import partial

from deltaw.model.load import resolve_base
from workers import HERE, Worker, append, identity, spread, started, take_turns


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gguf", required=True)
    p.add_argument("--llama-path")
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--steps", type=int, default=5)
    p.add_argument("--prompt", type=int, default=512)
    p.add_argument("--answer", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    sizes = ["--prompt", str(args.prompt), "--answer", str(args.answer), "--threads", str(args.threads)]
    base = ["--base", str(resolve_base(args.base))]
    env = {"PYTHONPATH": args.llama_path} if args.llama_path else None
    plans = {
        "deltaw": partial(Worker, "ours_stream.py", [*base, *sizes]),
        "deltaw-nf4": partial(Worker, "ours_stream.py", [*base, "--format", "nf4", *sizes]),
        "llama.cpp": partial(Worker, "peers/llama_cpp_stream.py", ["--gguf", args.gguf, *sizes], env=env),
    }
    with started(plans) as workers:
        rows, _ = take_turns(workers, args.steps, 1)
    found = {
        name: {
            "decode_tokens_per_s": spread([args.answer / s["decode_s"] for s in steps], 1),
            "prompt_tokens_per_s": spread([args.prompt / s["prompt_s"] for s in steps], 1),
        }
        for name, steps in rows.items()
    }
    for name, values in found.items():
        told = ", ".join(f"{key} {v['median']} ({v['low']} to {v['high']})" for key, v in values.items())
        print(f"{name:12} {told}")
    told = {"prompt": args.prompt, "answer": args.answer, "gguf": args.gguf.rpartition("/")[2]}
    append(HERE / "results" / "stream.jsonl", {**identity("stream"), **told, "tools": found})


if __name__ == "__main__":
    main()
