"""Are our kernels on 4-bit matrices faster than bitsandbytes' on the same machine, and near the memory's speed?

The naive answers they must beat: bitsandbytes' CPU operators (the whole matrix dequantised and a dense product; and,
for inference only, codes repacked for AVX512-BF16), and the dense bf16 matrix. What would change our mind: at 2,048
rows a ratio below 1; at one row less than 3, or less than 60 % of the bandwidth of a loop that only reads.

    .venv/bin/python bench/bench_kernels.py [--layers 46] [--rounds 7] [--path avx2]

Matrices: the seven linear maps of Llama-like layers, hidden 1,536, inner 8,960 (a 1.5B model). One row and the
bandwidth run over all layers, at least 1 GiB of codes; the rest over few. Every tool takes its turn in every round;
figures are medians, ratios are medians of each round's ratio. Freed memory is kept by the process, so that no tool pays
page faults. Prints tables; appends one JSON row to bench/results/kernels.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.formats.int8 import Int8Weight
from deltaw.formats.nf4 import NF4Weight
from deltaw.ops import native
from deltaw.ops.blockwise import Blocks, Scales, dequantise, mul, mul_t, quantise, quantise_scales
from deltaw.ops.native import build, calls
from deltaw.train.checkpoint import machine, versions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

HERE = Path(__file__).resolve().parent
BLOCK = 64
LAYER = ((1536, 1536), (256, 1536), (256, 1536), (1536, 1536), (8960, 1536), (8960, 1536), (1536, 8960))
Timed = dict[str, Callable[[], Any]]
BNB = torch.ops.bitsandbytes


class Matrices:
    """Some layers' matrices as random codes, for us and for bitsandbytes: the same bytes."""

    def __init__(self, layers: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.plain: list[Blocks] = []
        self.repacked: list[tuple[Tensor, Any]] = []
        for shape in LAYER * layers:
            n = shape[0] * shape[1]
            codes = torch.randint(0, 256, (n // 2,), generator=g, dtype=torch.uint8)
            absmax = torch.rand(n // BLOCK, generator=g) * 0.1
            self.plain.append(Blocks(codes, Scales(absmax), NF4Weight.levels, BLOCK, shape))
            self.repacked.append(bnb._convert_weight_packed_for_cpu(codes, self.state(self.plain[-1])))

    @staticmethod
    def state(blocks: Blocks) -> Any:
        """bitsandbytes' description of the matrix."""
        return bnb.QuantState(
            absmax=blocks.scales.absmax, shape=torch.Size(blocks.shape), code=blocks.levels.table, blocksize=BLOCK,
            quant_type="nf4", dtype=torch.bfloat16,
        )  # fmt: skip

    def code_bytes(self) -> int:
        return sum(b.codes.numel() for b in self.plain)

    def bytes(self) -> int:
        """Codes and scales: what one product has to read."""
        return sum(b.codes.numel() + 4 * b.scales.absmax.numel() for b in self.plain)


def nested(blocks: Blocks) -> Blocks:
    scales = quantise_scales(blocks.scales.absmax)
    return Blocks(blocks.codes, scales, blocks.levels, blocks.block, blocks.shape)


def in_eight_bits(blocks: Blocks) -> Blocks:
    codes = torch.randint(0, 255, (blocks.shape[0] * blocks.shape[1],), dtype=torch.uint8)
    return Blocks(codes, blocks.scales, Int8Weight.levels, blocks.block, blocks.shape)


def each(items: Iterable[Any], run: Callable[[Any], Any]) -> None:
    """Run on every item; no result outlives its call."""
    for item in items:
        run(item)


def medians(tools: Timed, rounds: int, against: str) -> dict[str, Any]:
    """Seconds of each tool, and how many times as long as `against` it takes."""
    for run in tools.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in tools}
    order = list(tools)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            tools[name]()
            taken[name].append(time.perf_counter() - start)
        order = [*order[1:], order[0]]  # nobody always follows the same one: freed memory costs whoever comes next
    return {
        name: {
            "median_s": round(statistics.median(times), 6),
            "min_s": round(min(times), 6),
            "max_s": round(max(times), 6),
            "times_ours": round(statistics.median(t / o for t, o in zip(times, taken[against], strict=True)), 3),
        }
        for name, times in taken.items()
    }


def show(title: str, found: dict[str, Any], n_bytes: dict[str, int] | None = None) -> dict[str, Any]:
    print(f"\n{title}")
    for name, row in found.items():
        rate = f"  {n_bytes[name] / row['median_s'] / 1e9:6.1f} GB/s" if n_bytes else ""
        spread = f"{row['min_s'] * 1e3:9.2f} to {row['max_s'] * 1e3:9.2f}"
        print(f"  {name:34} {row['median_s'] * 1e3:9.2f} ms ({spread})  {row['times_ours']:6.2f} x ours{rate}")
    return found


# What is measured ----------------------------------------------------------------------------------------------------


def one_row(all_of: Matrices, rounds: int) -> dict[str, Any]:
    """One product with every matrix, and a loop that only reads as much."""
    x = {k: torch.randn(1, k).bfloat16() for k in (1536, 8960)}
    beside = torch.rand(all_of.bytes() // 4)
    doubly = [nested(b) for b in all_of.plain]
    tools: Timed = {
        "ours": lambda: each(all_of.plain, lambda b: mul(x[b.shape[1]], b)),
        "ours, double quantisation": lambda: each(doubly, lambda b: mul(x[b.shape[1]], b)),
        "bitsandbytes, repacked": lambda: each(both(all_of), lambda m: repacked(x[m[0].shape[1]], m[1])),
    }
    if native.path() != "reference":
        tools["a loop that only reads"] = lambda: calls.read_sum(beside)
        tools["the same over the codes"] = lambda: each(
            all_of.plain, lambda b: calls.read_sum(b.codes.view(torch.float32))
        )
    print(
        f"\nworking set: {all_of.code_bytes() / 2**30:.2f} GiB of codes, {all_of.bytes() / 2**30:.2f} GiB with scales,"
    )
    print(f"  read loop {4 * len(beside) / 2**30:.2f} GiB; {len(all_of.plain)} matrices")
    n_bytes = dict.fromkeys(tools, all_of.bytes())
    n_bytes["ours, double quantisation"] = sum(size_of(b) for b in doubly)
    n_bytes["the same over the codes"] = all_of.code_bytes()
    found = show("one row, all layers", medians(tools, rounds, "ours"), n_bytes)
    if "a loop that only reads" in found:
        loop = all_of.bytes() / found["a loop that only reads"]["median_s"]
        for name, key in (("ours", ""), ("ours, double quantisation", "_double_quant")):
            n, seconds = n_bytes[name], found[name]["median_s"]
            print(f"  {name} reads its {n / 2**30:.2f} GiB at {100 * n / seconds / loop:.0f} % of the loop's rate")
            found[f"share_of_bandwidth{key}"] = round(n / seconds / loop, 3)
    return found


def size_of(doubly: Blocks) -> int:
    """Codes, and the codes and constants of the scales, in bytes."""
    scales = doubly.scales
    assert scales.nested is not None
    return doubly.codes.numel() + scales.absmax.numel() + 4 * scales.nested.numel()


def both(some: Matrices) -> list[tuple[Blocks, tuple[Tensor, Any]]]:
    return list(zip(some.plain, some.repacked, strict=True))


def repacked(x: Tensor, matrix: tuple[Tensor, Any]) -> Tensor:
    """bitsandbytes' product for inference, from codes in its own order."""
    return bnb.gemv_4bit(x, matrix[0], state=matrix[1])


def whole(x: Tensor, b: Blocks) -> Tensor:
    """bitsandbytes' product for training: the whole matrix made dense."""
    return BNB.gemm_4bit(x, b.codes.view(-1, 1), list(b.shape), b.scales.absmax, BLOCK, "nf4")


def dense_of(b: Blocks, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """bitsandbytes' dequantise."""
    made: Tensor = BNB.dequantize_4bit(b.codes.view(-1, 1), b.scales.absmax, BLOCK, "nf4", list(b.shape), dtype)
    return made


def many_rows(some: Matrices, n: int, rounds: int, backward: bool) -> dict[str, Any]:
    """`n` rows through each matrix, bf16; `backward`: the input gradient."""
    side = 0 if backward else 1
    x = {k: torch.randn(n, k).bfloat16() for k in (256, 1536, 8960)}
    dense = [dequantise(b, torch.bfloat16) for b in some.plain]
    doubly = [nested(b) for b in some.plain]
    eight = [in_eight_bits(b) for b in some.plain]
    ours = mul_t if backward else mul
    tools: Timed = {
        "ours": lambda: each(some.plain, lambda b: ours(x[b.shape[side]], b)),
        "ours, double quantisation": lambda: each(doubly, lambda b: ours(x[b.shape[side]], b)),
        "ours, int8": lambda: each(eight, lambda b: ours(x[b.shape[side]], b)),
    }
    if backward:
        tools["bitsandbytes"] = lambda: each(some.plain, lambda b: x[b.shape[0]] @ dense_of(b))
        tools["dense bf16"] = lambda: each(dense, lambda w: x[w.shape[0]] @ w)
    else:
        tools["bitsandbytes"] = lambda: each(some.plain, lambda b: whole(x[b.shape[1]], b))
        tools["bitsandbytes, repacked"] = lambda: each(both(some), lambda m: repacked(x[m[0].shape[1]], m[1]))
        tools["dense bf16"] = lambda: each(dense, lambda w: F.linear(x[w.shape[1]], w))
    what = "input gradient" if backward else "product"
    return show(f"{n:,} rows, {what}, {len(some.plain)} matrices", medians(tools, rounds, "ours"))


def conversions(some: Matrices, rounds: int) -> dict[str, Any]:
    """Quantise from float32 and dequantise to bf16 and float32."""
    values = [dequantise(b) for b in some.plain]
    name = "nf4"
    back = {
        "ours": lambda: each(some.plain, lambda b: dequantise(b, torch.bfloat16)),
        "bitsandbytes": lambda: each(some.plain, lambda b: dense_of(b)),
    }
    to_float = {
        "ours": lambda: each(some.plain, lambda b: dequantise(b)),
        "bitsandbytes": lambda: each(some.plain, lambda b: dense_of(b, torch.float32)),
    }
    make = {
        "ours": lambda: each(values, lambda w: quantise(w, NF4Weight.levels, BLOCK)),
        "bitsandbytes": lambda: each(values, lambda w: bnb.quantize_4bit(w, blocksize=BLOCK, quant_type=name)),
    }
    return {
        "dequantise_bf16": show("dequantise to bf16", medians(back, rounds, "ours")),
        "dequantise_float32": show("dequantise to float32", medians(to_float, rounds, "ours")),
        "quantise": show("quantise from float32", medians(make, rounds, "ours")),
    }


def keep_freed_memory() -> None:
    """glibc: no mmap for large blocks, no trimming. Else page faults of fresh outputs cost up to ten times the work,
    for whichever tool comes at the wrong moment."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        print("no mallopt here: page faults are in the figures")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--layers", type=int, default=46, help="layers for one row and the bandwidth; 46 are 1 GiB of codes")
    p.add_argument("--few", type=int, default=2, help="layers for everything else")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--path", default=native.path(), help="one that `deltaw inspect --machine` lists")
    p.add_argument("--out", type=Path, default=HERE / "results" / "kernels.jsonl")
    args = p.parse_args()
    keep_freed_memory()
    load = os.getloadavg()[0]
    print(f"path {args.path}, {torch.get_num_threads()} threads, load {load:.2f} (a busy machine bends every figure)")
    with native.forced(args.path), torch.no_grad():
        few = Matrices(args.few)
        found: dict[str, Any] = conversions(few, args.rounds)
        for n in (1, 16, 48, 2048):
            found[f"rows_{n}"] = many_rows(few, n, args.rounds, backward=False)
        found["rows_2048_t"] = many_rows(few, 2048, args.rounds, backward=True)
        del few
        everything = Matrices(args.layers)
        found["one_row_all"] = one_row(everything, args.rounds)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE)
    row = {
        "bench": "kernels",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": git.stdout.strip() or None,
        "native_sources": build.sources_hash(),
        "path": args.path,
        "machine": machine() | {"load": round(load, 2)},
        "versions": versions() | {"bitsandbytes": version("bitsandbytes")},
        "sizes": {"layers": args.layers, "few": args.few, "block": BLOCK, "rounds": args.rounds, "seed": 0}
        | {"code_bytes": everything.code_bytes(), "bytes": everything.bytes()},
        "found": found,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
