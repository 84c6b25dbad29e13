"""Checkpoints: written whole or not at all, enough to go on bit for bit.

    RUN/run.json               recipe, data hash, base, versions, machine: what makes it this run
    RUN/metrics.jsonl          every event but `saved`; cut back to the checkpoint's length on resume
    RUN/checkpoints/00000120/  state.safetensors (parameters, optimizer), state.json (step, best, counts)

No random state is kept because none exists: the order of rows, dropout and fresh parameters are functions of
(seed, epoch or step, place).
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltaw.core.fingerprint import BaseFingerprint
from deltaw.errors import RunError, WorkFailed
from deltaw.model.base import has_fast_bfloat16
from deltaw.model.identity import told_differences
from deltaw.ops import native
from deltaw.store.files import whole_folder, write_text

KEEP = 2
BRIEFLY_S = 0.5
_LEFT = re.compile(r"\.(adapter|last|model|run\.json|done\.json|\d{8})\.[0-9a-f]{8}(\.part|\.old)?")
"""Names under which store/files.py writes aside."""


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    packages = ("deltaw", "torch", "transformers", "tokenizers", "safetensors")
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """What bit-exact resume depends on: processor architecture, instruction set, threads, which kernels run."""
    return {
        "architecture": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "bf16": has_fast_bfloat16(),
        "amx": bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)()),
        "threads": torch.get_num_threads(),
        "native": native.path(),
    }


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold `out` for this process; RunError when another one trains there. A killed process holds nothing.

    Where no run begins, `out` is left as it was.
    """
    _refuse_foreign(out)
    was_there = out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be a run's folder: {error.strerror}. Choose another --out.") from None
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=BRIEFLY_S)
    except Timeout:
        raise RunError(f"Another process is training in {out}. Wait for it, or choose another --out.") from None
    try:
        yield
    finally:
        if not (out / "run.json").exists():
            with suppress(OSError):  # where an open file has to keep its name
                (out / ".lock").unlink()
                if not was_there:
                    out.rmdir()
        lock.release()


def is_training(out: Path) -> bool:
    """Whether a process trains in `out` now. Its lock is taken for a moment, for which `locked` waits."""
    if not (out / ".lock").is_file():
        return False
    lock = FileLock(out / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def find_run(out: Path, identity: dict[str, Any], allow_other_machine: bool) -> bool:
    """Whether this run is in `out` already; nothing is written.

    Raises RunError when `out` holds another run, or this one from another machine or other versions.
    """
    path = out / "run.json"
    identity = json.loads(json.dumps(identity))
    if not path.exists():
        _refuse_foreign(out)
        return False
    try:
        there = json.loads(path.read_text())
        _by_content(there)
        was_on = None if there.get("base") is None else BaseFingerprint(**there["base"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged: {error!r}. Choose another --out.") from None
    if lines := _other_base(was_on, identity["base"]):
        raise RunError(f"{out} holds another run, on another base:\n{lines}\n  Choose another --out, or remove it.")
    told_apart = ["versions", "machine", *(["base"] if there.get("base") and identity["base"] else [])]
    fixed = [k for k in {**identity, **there} if k not in told_apart]
    if told := _what_differs(_by_content(there), _by_content(identity), fixed):
        raise RunError(f"{out} holds another run: its {told}. Choose another --out, or remove it.")
    moved = _what_differs(there, identity, ["versions", "machine"])
    if moved and not allow_other_machine:
        raise RunError(
            f"{out} was begun elsewhere: its {moved}. It would not go on bit for bit; "
            "pass --allow-other-machine to go on all the same."
        )
    return True


def _refuse_foreign(out: Path) -> None:
    """Raise RunError where `out` is a folder with files, and none of them says that it is a run's."""
    if out.is_dir() and not (out / "run.json").exists():
        others = [p.name for p in out.iterdir() if p.name != ".lock" and not _LEFT.fullmatch(p.name)]
        if others:
            raise RunError(f"{out} holds something that is not a run ({others[0]}). Choose another --out.")


def _other_base(there: BaseFingerprint | None, here: dict[str, Any] | None) -> str:
    """Field by field how the base of the run that is there differs from this one's, whatever their folders' names."""
    if not there or not here:
        return ""  # one was made in memory: find_run compares them whole
    return "\n".join(told_differences(there.differences(BaseFingerprint(**here)), "the run"))


def begin_run(out: Path, identity: dict[str, Any]) -> None:
    """Make `out` this run's folder, and clear away what a kill left half written."""
    if not (out / "run.json").exists():
        write_text(out / "run.json", json.dumps(identity, indent=1) + "\n")
    for left in (*out.glob(".*"), *(out / "checkpoints").glob(".*")):
        if _LEFT.fullmatch(left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _by_content(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity without paths: base, rows and labels are compared by what they hold, wherever they are."""
    recipe = {name: dict(part) if isinstance(part, dict) else part for name, part in identity["recipe"].items()}
    for section, keys in (("base", ("path",)), ("data", ("train", "valid")), ("eval", ("labels",))):
        for key in keys:
            recipe[section].pop(key, None)
    return {**identity, "recipe": recipe}


def _what_differs(there: dict[str, Any], here: dict[str, Any], keys: list[str], most: int = 3) -> str:
    found: list[str] = []

    def walk(path: str, a: Any, b: Any) -> None:
        if isinstance(a, dict) and isinstance(b, dict):
            for key in sorted({*a, *b}):
                walk(f"{path}.{key}", a.get(key), b.get(key))
        elif a != b:
            found.append(f"{path} is {a!r}, this one's is {b!r}")

    for key in keys:
        walk(key, there.get(key), here.get(key))
    return "; ".join(found[:most]) + (f"; and {len(found) - most} more" if len(found) > most else "")


def save_checkpoint(out: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write checkpoint `step`, then drop all but the newest two. A kill leaves the older ones whole."""
    if not (out / "run.json").is_file():
        raise WorkFailed(f"{out} was removed, or emptied, while this run trained there: begin it again.")
    target = out / "checkpoints" / f"{step:08d}"
    with whole_folder(target) as aside:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(state))
    kept = sorted(p for p in target.parent.iterdir() if not p.name.startswith("."))
    for old in kept[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def newest_checkpoint(out: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint's tensors and state, or None when there is none."""
    folder = out / "checkpoints"
    found = sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []
    if not found:
        return None
    try:
        state = json.loads((found[-1] / "state.json").read_text())
        if not (isinstance(state, dict) and all(type(state.get(key)) is int for key in ("step", "metrics_bytes"))):
            raise ValueError("state.json lacks what a checkpoint keeps")
        return load_file(found[-1] / "state.safetensors"), state
    except (SafetensorError, OSError, ValueError) as error:
        raise RunError(
            f"Checkpoint {found[-1]} is damaged: {error}. Remove that folder to go on from the one before."
        ) from None
