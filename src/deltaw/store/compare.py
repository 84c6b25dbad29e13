"""What differs between two adapters of a registry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from deltaw.core.adapter import Adapter
from deltaw.store.peft import read_adapter

if TYPE_CHECKING:
    from deltaw.store.registry import Registry


def compare_adapters(registry: Registry, a: str, b: str) -> dict[str, Any]:
    """The difference of two adapters, as plain data; each entry is {key: [in a, in b]}.

    settings, recipe, base   keys whose values differ (dotted)
    metrics, data_hash       of both
    tensors                  counts: same (bit for bit), changed, only_a, only_b; `largest_change`: of
                             one number, None where no two shapes are alike
    related                  "a is a parent of b", or the other way round, or None
    """
    first, second = registry.resolve(a), registry.resolve(b)
    one, two = read_adapter(registry.folder(a)), read_adapter(registry.folder(b))
    notes = one.provenance, two.provenance
    related = None
    if one.id in notes[1].get("parents", []):
        related = f"{first} is a parent of {second}"
    elif two.id in notes[0].get("parents", []):
        related = f"{second} is a parent of {first}"
    prints = [{} if x.fingerprint is None else x.fingerprint.model_dump() for x in (one, two)]
    return {
        "a": {"version": str(first), "id": one.id},
        "b": {"version": str(second), "id": two.id},
        "same": one.id == two.id,
        "related": related,
        "settings": _differing(one.spec.model_dump(mode="json"), two.spec.model_dump(mode="json")),
        "base": _differing(*prints),
        "recipe": _differing(notes[0].get("recipe") or {}, notes[1].get("recipe") or {}),
        "data_hash": _differing(*({"data_hash": n.get("data_hash")} for n in notes)).get("data_hash"),
        "metrics": [n.get("metrics") for n in notes],
        "tensors": _tensors(one, two),
    }


def _differing(a: dict[str, Any], b: dict[str, Any]) -> dict[str, list[Any]]:
    def walk(path: str, x: Any, y: Any) -> Iterator[tuple[str, list[Any]]]:
        if isinstance(x, dict) and isinstance(y, dict):
            for key in sorted({*x, *y}):
                yield from walk(f"{path}.{key}" if path else key, x.get(key), y.get(key))
        elif x != y:
            yield path, [x, y]

    return dict(walk("", a, b))


def _tensors(a: Adapter, b: Adapter) -> dict[str, Any]:
    ours, theirs = a.tensors(), b.tensors()
    both = sorted(ours.keys() & theirs.keys())
    same = [name for name in both if _equal(ours[name], theirs[name])]
    gaps = [
        float((ours[n].double() - theirs[n].double()).abs().max())
        for n in both
        if n not in same and ours[n].shape == theirs[n].shape
    ]
    return {
        "same": len(same),
        "changed": len(both) - len(same),
        "only_a": len(ours.keys() - theirs.keys()),
        "only_b": len(theirs.keys() - ours.keys()),
        "largest_change": max(gaps, default=None if both and not same else 0.0),
    }


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
