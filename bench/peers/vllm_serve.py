"""vLLM's CPU build as a worker that runs serving cases: bench_serve_peers.py. One step runs all of them in turn.

LoRA is on only where a case has adapters. Everything runs in one process (no other one polls beside the tools that are
measured in turn), both cores compute, the model is compiled (vLLM's default) unless --eager.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from serving_cases import Case, parser
from workers import serve


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--eager", action="store_true")
    args = p.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{args.threads - 1}", "OMP_NUM_THREADS": str(args.threads)}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    most = max(case.adapters for _, case in args.case)
    lora = {"enable_lora": True, "max_loras": most, "max_lora_rank": 16} if most else {}
    model = LLM(
        args.base, dtype="bfloat16", max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False, seed=0,
        distributed_executor_backend="uni", enforce_eager=args.eager, **lora,
    )  # fmt: skip
    draws = random.Random(0)

    def run(case: Case) -> dict[str, float]:
        prompts = [{"prompt_token_ids": ids} for ids in case.prompts(draws)]
        how = SamplingParams(max_tokens=case.answer, temperature=0, ignore_eos=True)
        worn = None
        if case.adapters:
            of = [i % case.adapters for i in range(case.n)]
            worn = [LoRARequest(f"a{i}", i + 1, args.adapter[i]) for i in of]
        start = time.perf_counter()
        outputs = model.generate(prompts, how, use_tqdm=False, lora_request=worn)
        seconds = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == case.answer for o in outputs)
        return case.figures(seconds)

    serve(lambda: {name: run(case) for name, case in args.case})


if __name__ == "__main__":
    main()
