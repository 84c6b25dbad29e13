"""Real processes that are killed while they change a registry; what must hold afterwards.

`crowd`    three processes do random things at once, each is killed at a random moment, again and again
`line`     one operation is killed at one line of the store's code

Processes are forks of this one, so run it as a program of its own: python tests/store/campaign.py --help
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from sqlalchemy import select
from tiny_adapters import tiny

from deltaw.errors import NotFound, RegistryError
from deltaw.store.index import moves
from deltaw.store.objects import object_folder
from deltaw.store.registry import Registry

NAMES = ("alpha", "beta", "gamma")
WORKERS = 3
Line = dict[str, Any]


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, run in a fork; None when the fork was killed."""
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        os.close(read)
        try:
            answer = {"value": work()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        return None
    answer = json.loads(text)
    assert "error" not in answer, answer["error"]
    return answer["value"]


# A crowd ---------------------------------------------------------------------------------------------


def work_until_killed(root: Path, log: Path, seed: int) -> None:
    """Random operations; a line is written before each one, and another when it has returned."""
    rng = random.Random(seed)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    registry = Registry(root)

    def say(**line: Any) -> None:
        os.write(out, json.dumps(line).encode() + b"\n")

    def version_of(name: str) -> str:
        rows = registry.show(name)["versions"]
        return f"{name}@{rng.choice(rows)['version']}" if rows else f"{name}@1"

    for number in range(10**6):
        name, what = rng.choice(NAMES), rng.choices(("add", "promote", "rollback", "remove", "gc"), (4, 3, 2, 3, 1))[0]
        try:
            if what == "add":
                adapter = tiny(seed * 10_000 + number)
                say(begin=what)
                made = registry.add(name, adapter)
                say(end=what, name=name, version=made["version"], id=made["id"])
            elif what == "promote":
                ref = version_of(name)
                say(begin=what)
                made = registry.promote(ref)
                say(end=what, name=name, version=made["version"], changed=made["changed"])
            elif what == "rollback":
                say(begin=what)
                made = registry.rollback(name)
                say(end=what, name=name, version=made["version"], changed=True)
            elif what == "remove":
                ref = version_of(name)
                say(begin=what, ref=ref)
                registry.remove(ref)
                say(end=what, ref=ref)
            else:
                say(begin=what)
                say(end=what, deleted=len(registry.gc()["deleted"]))
        except (RegistryError, NotFound) as refusal:
            say(end="refused", what=what, why=str(refusal))
        except BaseException:
            say(end="error", what=what, trace=traceback.format_exc())
            os._exit(1)


def crowd(root: Path, seed: int, rounds: int, longest_s: float) -> Counter[str]:
    """Rounds of three processes that are killed; returns counts. Raises AssertionError when something is lost."""
    counts: Counter[str] = Counter()
    logs = Path(tempfile.mkdtemp(dir=root.parent))
    rng = random.Random(seed)
    in_child(lambda: [Registry(root, create=True).add(n, tiny(-i - 1))["version"] for i, n in enumerate(NAMES)])
    every: list[Line] = []
    for number in range(rounds):
        files = [logs / f"{number}-{w}" for w in range(WORKERS)]
        pids = []
        for w, file in enumerate(files):
            if (pid := os.fork()) == 0:
                work_until_killed(root, file, 1 + seed * 1000 + number * WORKERS + w)
            pids.append(pid)
        deadline = time.monotonic() + 20
        while not all(f.is_file() and f.stat().st_size for f in files) and time.monotonic() < deadline:
            time.sleep(0.002)
        for pid in rng.sample(pids, len(pids)):
            time.sleep(rng.uniform(0, longest_s))
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            assert os.WIFSIGNALED(status), [f.read_text()[-3000:] for f in files]
        for file in files:
            lines = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
            assert not [line for line in lines if line.get("end") == "error"], lines
            counts.update(line["end"] for line in lines if "end" in line)
            counts["killed"] += 1
            counts["killed in an operation"] += "begin" in lines[-1]
            every += lines
        problem = in_child(lambda seen=every: check(root, seen))
        assert problem is None, f"after round {number}: {problem}"
        counts["verified"] += 1
    return counts


def check(root: Path, lines: list[Line]) -> str | None:
    """What is wrong with a registry, given all that its users were told; None when nothing is."""
    registry = Registry(root)
    found = registry.verify()
    if not found["sound"]:
        return f"verify: {found}"
    tried = {line["ref"] for line in lines if line.get("begin") == "remove"}
    gone = {line["ref"] for line in lines if line.get("end") == "remove"}
    added: dict[str, str] = {}
    for line in (x for x in lines if x.get("end") == "add"):
        ref = f"{line['name']}@{line['version']}"
        if added.setdefault(ref, line["id"]) != line["id"]:
            return f"{ref} was given twice"
    for ref, adapter_id in added.items():
        if ref in gone:
            try:
                return f"{registry.resolve(ref)} was removed, and is there"
            except NotFound:
                continue
        if ref not in tried and registry.resolve(ref).id != adapter_id:
            return f"{ref} is another adapter"
    with registry.index.reading() as db:
        kept = Counter(tuple(r) for r in db.execute(select(moves.c.name, moves.c.action, moves.c.version)))
    told = Counter(
        (x["name"], x["end"], x["version"]) for x in lines if x.get("end") in ("promote", "rollback") and x["changed"]
    )
    return f"moves were lost: {told - kept}" if told - kept else None


# One line ----------------------------------------------------------------------------------------------


def prepare(root: Path) -> None:
    """A registry in which every operation below has something to do."""
    registry = Registry(root, create=True)
    for seed in range(1, 6):
        registry.add("alpha", tiny(seed))
    registry.promote("alpha@2")
    registry.remove("alpha@3")
    registry.add("beta", tiny(9))
    broken = object_folder(root, registry.resolve("beta@1").id) / "adapter_model.safetensors"
    broken.chmod(0o644)
    broken.write_bytes(broken.read_bytes()[:-1])


OPERATIONS: dict[str, Callable[[Registry], Any]] = {
    "create": lambda registry: Registry(registry.root.parent / "fresh", create=True),
    "add": lambda registry: registry.add("alpha", tiny(7)),
    "mend": lambda registry: registry.add("beta", tiny(9)),
    "promote": lambda registry: registry.promote("alpha@4"),
    "rollback": lambda registry: registry.rollback("alpha"),
    "remove": lambda registry: registry.remove("alpha@4"),
    "gc": lambda registry: registry.gc(),
    "folder": lambda registry: str(registry.folder("alpha@1")),
}


def at_line(number: int, work: Callable[[], Any]) -> int:
    """Run `work`, killing this process before line `number` of the store's code; returns how many lines it ran."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if "deltaw/store/" not in frame.f_code.co_filename.replace(os.sep, "/"):
            return None
        if event == "line":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return count


def kill_at_lines(folder: Path, name: str, every: int, first: int = 1) -> int:
    """Kill an operation at each `every`-th of its lines; returns how often. Raises AssertionError for what is left."""
    ready, root = folder / "ready", folder / "root"
    if not ready.exists():
        in_child(lambda: prepare(ready))
    operation = OPERATIONS[name]

    def fresh() -> None:
        for path in (root, folder / "fresh"):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(ready, root)

    fresh()
    n_lines = in_child(lambda: at_line(0, lambda: operation(Registry(root))))
    killed = 0
    for number in range(first, n_lines + 1, every):
        fresh()
        assert in_child(lambda n=number: at_line(n, lambda: operation(Registry(root)))) is None, "it was not killed"
        killed += 1
        problem = in_child(lambda: after_line(root, name))
        assert problem is None, f"{name}, killed at line {number} of {n_lines}: {problem}"
    return killed


def after_line(root: Path, name: str) -> str | None:
    """What is wrong after a kill; None when nothing is, the operation runs, and gc leaves nothing behind."""
    registry = Registry(root)
    found = registry.verify()
    broken = {v for d in found["damaged"] for v in d["versions"]}
    if found["problems"] or not broken <= {"beta@1"} or (name != "mend" and not broken):
        return f"verify: {found}"
    kept = {v["version"] for v in registry.show("alpha")["versions"]}
    if not {1, 2, 5} <= kept or 3 in kept:
        return f"versions of alpha: {kept}"
    try:
        OPERATIONS[name](registry)
    except (RegistryError, NotFound):
        if name not in ("remove", "rollback"):  # those may have been done before the kill
            raise
    registry.add("beta", tiny(9))
    registry.gc()
    if (fresh := root.parent / "fresh").is_dir() and list(fresh.glob(".registry.json.*")):
        return f"left behind: {list(fresh.iterdir())}"
    left = [p.name for p in (root / "aside").iterdir()]
    if left or len(list((root / "leases").glob("*.lock"))) != 1:
        return f"left behind: {left}, {list((root / 'leases').iterdir())}"
    found = registry.verify()
    return None if found["sound"] and not found["unreferenced"] else f"verify at the end: {found}"


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--rounds", type=int, default=10, help="of the crowd; three processes are killed in each")
    p.add_argument("--longest-s", type=float, default=0.15, help="before the next of them is killed")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--every", type=int, default=0, help="kill operations at each such line (0: not at all)")
    args = p.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"crowd": crowd(Path(folder) / "root", args.seed, args.rounds, args.longest_s)}
        if args.every:
            (at := Path(folder) / "lines").mkdir()
            found["lines"] = {
                name: kill_at_lines(at, name, args.every, 1 + args.seed % args.every) for name in OPERATIONS
            }
    print(json.dumps({**found, "seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
