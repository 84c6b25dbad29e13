"""The dense oracle of the combining tests: what each method does to a base, written the slow way in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from made_bases import stored
from torch import Tensor

from deltaw.core.adapter import Adapter

Sum = Callable[[list[Tensor], list[float]], Tensor]


def weighted(deltas: list[Tensor], weights: list[float]) -> Tensor:
    return sum(w * d for w, d in zip(weights, deltas, strict=True))  # type: ignore[return-value]


def changed(base: dict[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor that one adapter changes, by the files' names: as it is then, in the files' orientation."""
    spec, out = adapter.spec, {r.tensor: r.value.double() for r in adapter.replaced}
    for place in adapter.places:
        p = {k: v.double() for k, v in adapter.sites[place.name].items()}
        key, turned = f"{place.name}.weight", place.kind != "linear"
        W = base[key].double().T if turned else base[key].double()
        if "bias" in p:
            out[f"{place.name}.bias"] = p["bias"]
        if spec.name in ("lora", "dora") and "A" in p:
            r = p["A"].shape[0]
            alpha = next((v for k, v in spec.alpha_pattern.items() if place.name.endswith(k)), spec.alpha)
            W2 = W + alpha / (math.sqrt(r) if spec.rslora else r) * p["B"] @ p["A"]
            if spec.name == "dora":
                W2 = W2 * (p["m"] / W2.norm(dim=1))[:, None]
        elif spec.name == "vera":
            A0, B0 = (adapter.shared[k].double() for k in ("A0", "B0"))
            W2 = W + p["b"][:, None] * (B0[: W.shape[0]] @ (p["d"][:, None] * A0[:, : W.shape[1]]))
        elif spec.name == "ia3":
            W2 = W * p["l"]  # [1, in] or [out, 1]
            if p["l"].shape[1] == 1 and place.has_bias:
                out[f"{place.name}.bias"] = p["l"][:, 0] * base[f"{place.name}.bias"].double()
        else:
            continue
        out[key] = W2.T if turned else W2
    return out


def dense_changes(
    folder: Path, adapters: Sequence[Adapter], weights: Sequence[float], combine: Sum = weighted
) -> dict[str, Tensor]:
    """What the sum of the adapters adds to each tensor, by the files' names."""
    base = stored(folder)
    per = [{n: v - base[n].double() for n, v in changed(base, a).items()} for a in adapters]
    names = sorted({n for one in per for n in one})
    return {
        n: combine([d[n] for d in per if n in d], [w for w, d in zip(weights, per, strict=True) if n in d])
        for n in names
    }


def applied(
    folder: Path, adapters: Sequence[Adapter], weights: Sequence[float], combine: Sum = weighted
) -> dict[str, Tensor]:
    """Every tensor of the base with the sum added."""
    moved = dense_changes(folder, adapters, weights, combine)
    return {n: t.double() + moved[n] if n in moved else t.double() for n, t in stored(folder).items()}


def lora_change(adapter: Adapter, site: str) -> Tensor:
    """dW [out, in] of a LoRA adapter at one site, as any reader of its files would have it."""
    params = adapter.sites[site]
    place = next(p for p in adapter.places if p.name == site)
    return adapter.spec.scale_at(place) * params["B"].double() @ params["A"].double()
