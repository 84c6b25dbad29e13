"""llama.cpp (llama-cpp-python) as a worker that runs serving cases: bench_serve_peers.py.

One step runs all cases in turn. Several sequences share a batch of llama_decode, each with its own number; the next
token is the likeliest. Each case has a context of its own size. --base is a GGUF file, as --adapter is.
"""

from __future__ import annotations

import ctypes
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama_cpp as l
import numpy as np

from serving_cases import Case, Ids, parser
from workers import serve

BATCH = 2048


def context(model: Any, case: Case, threads: int) -> Any:
    """A context for a case's sequences."""
    p = l.llama_context_default_params()
    p.n_ctx = case.n * -(-(case.prompt + case.answer) // 256) * 256  # a multiple of 256 for each
    p.n_batch, p.n_seq_max, p.n_threads, p.n_threads_batch = BATCH, case.n, threads, threads
    made = l.llama_init_from_model(model, p)
    if not made:
        raise SystemExit("llama.cpp makes no context")
    return made


class Rows:
    """A batch for llama_decode: tokens of several sequences."""

    def __init__(self, n: int) -> None:
        self.batch = l.llama_batch_init(n, 0, 1)

    def decode(self, ctx: Any, rows: list[tuple[int, int, int, bool]]) -> None:
        """Compute rows (token, place, sequence, whether its logits are wanted)."""
        b = self.batch
        b.n_tokens = len(rows)
        for i, (token, place, sequence, wanted) in enumerate(rows):
            b.token[i], b.pos[i], b.logits[i] = token, place, wanted
            b.n_seq_id[i], b.seq_id[i][0] = 1, sequence
        if (code := l.llama_decode(ctx, b)) != 0:
            raise SystemExit(f"llama_decode: {code}")


def main() -> None:
    args = parser(__doc__).parse_args()
    l.llama_backend_init()
    model = l.llama_model_load_from_file(args.base.encode(), l.llama_model_default_params())
    vocab = l.llama_vocab_n_tokens(l.llama_model_get_vocab(model))
    contexts = {name: context(model, case, args.threads) for name, case in args.case}
    for name, case in args.case:
        if case.adapters:
            adapter = l.llama_adapter_lora_init(model, args.adapter[0].encode())
            worn, scale = (l.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
            if case.adapters > 1 or l.llama_set_adapters_lora(contexts[name], worn, 1, scale):
                raise SystemExit("llama.cpp wears one adapter at a time")
    rows, draws = Rows(BATCH), random.Random(0)

    def likeliest(ctx: Any, i: int) -> int:
        return int(np.ctypeslib.as_array(l.llama_get_logits_ith(ctx, i), shape=(vocab,)).argmax())

    def read(ctx: Any, prompts: Ids) -> list[int]:
        """The first token of each answer; as many whole prompts in a batch as fit."""
        first, at, many = [], 0, max(1, BATCH // len(prompts[0]))
        while at < len(prompts):
            some = range(at, min(at + many, len(prompts)))
            given = [(t, p, s, p + 1 == len(prompts[s])) for s in some for p, t in enumerate(prompts[s])]
            rows.decode(ctx, given)
            first += [likeliest(ctx, i) for i, row in enumerate(given) if row[3]]
            at = some.stop
        return first

    def run(name: str, case: Case) -> dict[str, float]:
        ctx, prompts = contexts[name], case.prompts(draws)
        l.llama_memory_clear(l.llama_get_memory(ctx), True)
        start = time.perf_counter()
        tokens = read(ctx, prompts)
        middle = time.perf_counter()
        for n in range(case.answer - 1):
            rows.decode(ctx, [(token, case.prompt + n, s, True) for s, token in enumerate(tokens)])
            tokens = [likeliest(ctx, i) for i in range(case.n)]
        end = time.perf_counter()
        decoded = case.n * (case.answer - 1) / (end - middle) if case.answer > 1 else 0.0
        return case.figures(end - start, decode_tokens_per_s=round(decoded, 2))

    serve(lambda: {name: run(name, case) for name, case in args.case})


if __name__ == "__main__":
    main()
