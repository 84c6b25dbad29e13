"""transformers' generate with PEFT as a worker that runs serving cases: bench_serve_peers.py.

One step runs all cases in turn. Adapters are in bfloat16 like the base (PEFT's float32 default is slower). A case on
the base alone runs on a model without PEFT's wrappers; several adapters share a batch by `adapter_names`.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from serving_cases import Case, parser
from workers import serve


def main() -> None:
    args = parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.bfloat16).eval()

    plain, worn = load(), None
    for number, folder in enumerate(args.adapter):
        if worn is None:
            worn = PeftModel.from_pretrained(load(), folder, str(number), autocast_adapter_dtype=False).eval()
        else:
            worn.load_adapter(folder, str(number), autocast_adapter_dtype=False)
    draws = random.Random(0)

    def run(case: Case) -> dict[str, float]:
        ids = torch.tensor(case.prompts(draws))
        how = {"max_new_tokens": case.answer, "min_new_tokens": case.answer, "do_sample": False, "pad_token_id": 2}
        model = plain
        if case.adapters:
            model = worn
            worn.set_adapter("0")
        if case.adapters > 1:
            how["adapter_names"] = [str(i % case.adapters) for i in range(case.n)]
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        seconds = time.perf_counter() - start
        assert out.shape == (case.n, case.prompt + case.answer)
        return case.figures(seconds)

    serve(lambda: {name: run(case) for name, case in args.case})


if __name__ == "__main__":
    main()
