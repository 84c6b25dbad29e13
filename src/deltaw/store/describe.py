"""What a saved adapter or a run is, as plain data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.errors import RunError
from deltaw.store.peft import adapter_folder, read_adapter

RUN, DONE, WHOLE = "run.json", "done.json", "model"


def describe_adapter(path: str | Path) -> dict[str, Any]:
    """A saved adapter: method, settings, sizes, places by role, base, provenance. Raises AdapterError."""
    folder = adapter_folder(path)
    adapter = read_adapter(folder)
    files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()}
    return {
        "kind": "adapter",
        "path": str(folder),
        "id": adapter.id,
        "method": adapter.spec.name,
        "settings": adapter.spec.model_dump(mode="json"),
        "n_parameters": adapter.n_parameters,
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in adapter.tensors().values()}),
        "size_mb": round(sum(files.values()) / 1e6, 3),
        "n_places": len(adapter.places),
        "places": _by_role(adapter),
        "shared": {name: list(tensor.shape) for name, tensor in adapter.shared.items()},
        "overrides": adapter.overrides,
        "replaced": [
            {
                "tensor": r.tensor,
                "shape": list(r.value.shape),
                "rows": None if r.rows is None else list(r.rows),
            }
            for r in adapter.replaced
        ],
        "fingerprint": None if adapter.fingerprint is None else adapter.fingerprint.model_dump(),
        "provenance": adapter.provenance,
    }


def is_adapter(path: Path) -> bool:
    """Whether an adapter lies in `path` or, for a run, below it."""
    return any((folder / "adapter_config.json").is_file() for folder in (path, path / "adapter"))


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run."""
    return (path / RUN).is_file()


def describe_run(path: str | Path) -> dict[str, Any]:
    """A run: what it was asked for, how far it is, and its adapter (None while it has none).

    Raises RunError when its files cannot be read.
    """
    path = Path(path)
    identity = _json(path / RUN)
    checkpoints = path / "checkpoints"
    return {
        "kind": "run",
        "path": str(path),
        "finished": (path / DONE).is_file(),
        "result": _json(path / DONE) if (path / DONE).is_file() else None,
        "checkpoints": sorted(p.name for p in checkpoints.iterdir()) if checkpoints.is_dir() else [],
        "identity": identity,
        "model": str(path / WHOLE) if (path / WHOLE).is_dir() else None,
        "adapter": describe_adapter(path) if is_adapter(path) else None,
    }


def _by_role(adapter: Adapter) -> list[dict[str, Any]]:
    """Places of the same role, size, rank and scale counted together."""
    scale_at = getattr(adapter.spec, "scale_at", None)
    found: dict[str, dict[str, Any]] = {}
    for place in adapter.places:
        params = adapter.sites[place.name]
        is_low_rank = "A" in params and "B" in params
        row = {
            "role": place.role,
            "kind": place.kind,
            "rank": params["A"].shape[0] if is_low_rank else None,
            "scale": scale_at(place) if scale_at is not None and is_low_rank else None,
            "parameters": {name: list(tensor.shape) for name, tensor in params.items()},
        }
        entry = found.setdefault(json.dumps(row), {**row, "count": 0, "n_parameters": 0})
        entry["count"] += 1
        entry["n_parameters"] += sum(t.numel() for t in params.values())
    return list(found.values())


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise RunError(f"{path} cannot be read: {problem}.") from None
