"""How long a registry with thousands of adapters takes to list, resolve, promote ... (a row in results/registry.jsonl).

python bench/bench_registry.py [--names 5000] [--repeats 51]

The adapters are tiny (36 numbers each): the index is what is measured. Half of the names get a second version.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from workers import append, identity, spread

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "store"))

from tiny_adapters import BASE, tiny  # noqa: E402

from deltaw.store.registry import Registry  # noqa: E402


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--names", type=int, default=5000)
    p.add_argument("--repeats", type=int, default=51)
    p.add_argument("--out", type=Path, default=HERE / "results" / "registry.jsonl")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(Path(folder) / "registry", create=True)
        adds = []
        for i in range(args.names + args.names // 2):
            adapter = tiny(i, recipe={"train": {"lr": 1e-3, "seed": i}}, metrics={"valid_loss": 1 / (i + 1)})
            began = time.perf_counter()
            registry.add(f"name-{i % args.names}", adapter)
            adds.append(1e3 * (time.perf_counter() - began))
            if i % 500 == 499:
                print(f"{i + 1} adapters", flush=True)
        rng = random.Random(0)

        def one() -> str:
            return f"name-{rng.randrange(args.names // 2)}"

        work: dict[str, Callable[[], object]] = {
            "list": registry.listing,
            "list --base": lambda: registry.listing(BASE),
            "resolve name": lambda: registry.resolve(one()),
            "resolve name@version": lambda: registry.resolve(f"{one()}@2"),
            "resolve id": lambda: registry.resolve(tiny(rng.randrange(args.names)).id[:12]),
            "show name": lambda: registry.show(one()),
            "show version": lambda: registry.show(f"{one()}@1"),
            "folder": lambda: registry.folder(one()),
            "promote": lambda: registry.promote(f"{one()}@{rng.choice((1, 2))}"),
        }
        ms = {name: timed(call, args.repeats) for name, call in work.items()}
        began = time.perf_counter()
        assert registry.verify()["sound"]
        verify_s = time.perf_counter() - began
        code = "import sys; sys.argv = ['deltaw', *sys.argv[1:]]; from deltaw.cli.main import main; main()"
        command = [sys.executable, "-c", code, "adapters", "list", "--json", "--registry", str(registry.root)]
        ms["`deltaw adapters list --json`, whole process"] = timed(
            lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), 5
        )
        index_mb = (registry.root / "index.sqlite").stat().st_size / 1e6
    row = {
        **identity("registry"),
        "names": args.names,
        "adapters": len(adds),
        "repeats": args.repeats,
        "ms": {"add": spread(adds), **ms},
        "verify_s": round(verify_s, 1),
        "index_mb": round(index_mb, 2),
    }
    append(args.out, row)
    for name, found in row["ms"].items():
        busy = f", {found['cpu']:.2f} of CPU" if "cpu" in found else ""
        print(f"{name:45}{found['median']:10.2f} ms ({found['low']:.2f} to {found['high']:.2f}){busy}")


def timed(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds of one call: median and range, and the median of this process's own CPU time."""
    found, cpu = [], []
    for _ in range(repeats):
        began, busy = time.perf_counter(), time.process_time()
        call()
        found.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - busy))
    return {**spread(found), "cpu": spread(cpu)["median"]}


if __name__ == "__main__":
    main()
