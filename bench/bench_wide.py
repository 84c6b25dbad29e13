"""How near do products of many rows with frozen matrices (native/wide.h) come to what the processor can do?

The naive answer to beat: PyTorch's product of the same matrices (oneDNN), with `--torch`. With `--builds A.so B.so`:
is one build of the library faster than another? All take turns on the same matrices, call by call.

    .venv/bin/python bench/bench_wide.py [--builds LIB ...] [--shapes OUTxIN ...] [--rows N ...] [--format nf4]

Each product takes the next of several matrices, 64 MB together, so that they come from memory as in a step, and an
adapter of rank 16 goes with it. GFLOP/s are of the base's product alone, of the median call and of the best; a ratio is
the median of paired calls: over 1, the build is faster than the first one. Prints a table; nothing is written.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from deltaw.core.weight import Weight
from deltaw.formats.dense import DenseWeight
from deltaw.formats.nf4 import NF4Weight
from deltaw.ops.arena import Arena
from deltaw.ops.native import library, wide_calls
from deltaw.ops.wide import Band, Frozen, Term, products

OF_1_5B = ["2048x2048", "512x2048", "8192x2048", "2048x8192"]
OF_135M = ["576x576", "192x576", "1536x576", "576x1536"]
TOGETHER = 64 << 20


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--builds", nargs="*", type=Path, default=[library.LIBRARY], help="compiled libraries")
    p.add_argument("--shapes", nargs="+", default=OF_1_5B, help="out x in, or 1.5b, or 135m")
    p.add_argument("--rows", nargs="+", type=int, default=[256, 512, 1024, 2048])
    p.add_argument("--format", choices=["dense", "nf4"], default="dense")
    p.add_argument("--seconds", type=float, default=1.0, help="of each line of the table")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--side-by-side", action="store_true", help="rows of 2 KB begin in the same lines of a cache")
    p.add_argument("--torch", action="store_true", help="PyTorch's products beside ours")
    args = p.parse_args()
    named = {"1.5b": OF_1_5B, "135m": OF_135M}
    args.shapes = [s for name in args.shapes for s in named.get(name, [name])]
    return args


def opened(path: Path) -> tuple[object, int]:
    """A build and the number of its fastest path; its sources need not be those that are here."""
    real = library.sources_hash
    try:
        text = path.read_bytes()
        at = text.index(b"deltaw-sources:") + len(b"deltaw-sources:")
        library.sources_hash = lambda: text[at : at + 16].decode()
        native, problem = library.open_library(path.resolve())
    finally:
        library.sources_hash = real
    if native is None:
        raise SystemExit(problem)
    return native.handle, native.best


def matrices(out: int, cols: int, kind: str) -> list[Weight]:
    """Enough of them that none is still in a cache when its turn comes."""
    found: list[Weight] = []
    for _ in range(max(2, TOGETHER // (out * cols * 2))):
        w = torch.randn(out, cols, dtype=torch.bfloat16)
        found.append(NF4Weight.quantised(w, block=64, double_quant=True) if kind == "nf4" else DenseWeight(w))
    return found


def rows(n: int, width: int, side_by_side: bool) -> Tensor:
    beyond = 0 if side_by_side or width % 1024 else 32
    return torch.randn(n, width + beyond, dtype=torch.bfloat16)[:, :width]


def timed(call: Callable[[], object]) -> float:
    """Seconds; of one thread those that it ran, which others on the machine bend less."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def line(args: argparse.Namespace, weights: list[Weight], n: int, back: bool, builds: list[tuple[object, int]]) -> str:
    """One row of the table."""
    out, cols = weights[0].out_features, weights[0].in_features
    depth, wide = (out, cols) if back else (cols, out)
    x, u, y = (rows(n, k, args.side_by_side) for k in (depth, 16, wide))
    factor, arena = torch.randn(wide, 16, dtype=torch.bfloat16).T, Arena()
    ring = [Band(y, [Term(u, factor, 0.5), Term(x, Frozen(w, back))]) for w in weights]

    def ours(at: int) -> Callable[[], object]:
        return lambda: products([ring[at % len(ring)]], arena)

    def theirs(at: int) -> Callable[[], Tensor]:
        w = weights[at % len(weights)].dense(torch.bfloat16)
        return lambda: torch.mm(x, w if back else w.T, out=y)

    tools = len(builds) + args.torch
    seconds: list[list[float]] = [[] for _ in range(tools)]
    end, at = time.perf_counter() + args.seconds, 0
    while time.perf_counter() < end or len(seconds[-1]) < 5:
        for tool in [(i + at) % tools for i in range(tools)]:
            if tool < len(builds):
                wide_calls._library = lambda tool=tool: builds[tool]  # type: ignore[assignment]
            seconds[tool].append(timed(ours(at) if tool < len(builds) else theirs(at)))
            at += 1
    flops = 2e-9 * n * out * cols
    rates = [flops / statistics.median(s) for s in seconds]
    ratios = [statistics.median(a / b for a, b in zip(seconds[0], s, strict=True)) for s in seconds[1:]]
    best = [flops / min(s) for s in seconds]
    way = "back" if back else "forward"
    figures = " ".join(f"{r:7.0f} ({b:4.0f})" for r, b in zip(rates, best, strict=True))
    return f"{out:5} x {cols:5} {way:8} {n:5} {figures}   " + " ".join(f"{r:.3f}" for r in ratios)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    builds = [opened(path) for path in args.builds]
    print("   out      in way       rows  GFLOP/s (best) of", *args.builds, "PyTorch" if args.torch else "")
    for shape in args.shapes:
        out, cols = map(int, shape.split("x"))
        weights = matrices(out, cols, args.format)
        for n in args.rows:
            for back in (False, True):
                print(line(args, weights, n, back, builds), flush=True)


if __name__ == "__main__":
    main()
