"""Pictures 3 and 12: where adapters sit in a transformer block, from the base's own places."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from deltaw.core.affine import merged
from deltaw.core.site import BlockSite, VirtualSite
from deltaw.core.spec import MethodSpec, Start
from deltaw.lab.base import Lab
from deltaw.lab.controls import Controls, choice, controls, slider, switch
from deltaw.lab.lowrank import normal
from deltaw.lab.picture import Plain, number, percent
from deltaw.methods import BitFit, Dora, Houlsby, Ia3, Lora, PrefixTuning, Prompt
from deltaw.plan.network import Base, find_config, planned_model

LAYER = 0
"""The block that is drawn; the others are like it."""
SHOWN: dict[str, tuple[str, MethodSpec]] = {
    "lora": ("LoRA", Lora(rank=8, alpha=16)),
    "dora": ("DoRA", Dora(rank=8, alpha=16)),
    "houlsby": ("adapters", Houlsby()),
    "prefix": ("prefix", PrefixTuning()),
    "prompt": ("prompt", Prompt()),
    "ia3": ("IA3", Ia3()),
    "bitfit": ("BitFit", BitFit()),
}
"""What picture 12 can light up, with the settings it is counted at."""


def parts_of(lab: Lab) -> list[dict[str, Any]]:
    """The linear maps of the block that is drawn: role, half, shape, numbers."""
    return [
        {
            "role": site.role,
            "half": site.name.split(".")[-2],
            "name": site.name,
            "out": site.out_features,
            "in": site.in_features,
            "parameters": site.in_features * site.out_features,
        }
        for (layer, _), site in lab.linear.items()
        if layer == LAYER
    ]


# 3: adapter architecture ------------------------------------------------------------------------------


def architecture_controls(lab: Lab) -> type[Controls]:
    """Which map is looked at, the rank, and whether adapters are merged."""
    roles = [p["role"] for p in parts_of(lab)]
    part = "q_proj" if "q_proj" in roles else roles[0]
    return controls(
        "Picture3",
        part=choice(part, roles, "part", roles),
        rank=slider(8, 1, 64, "rank r", (4, 8, 32)),
        merged=switch(False, "merged", (False, True)),
    )


def architecture(lab: Lab, c: Any) -> Plain:
    """The block with an adapter beside every linear map, or merged into it; shape and cost of one part."""
    spec = Lora(rank=c.rank, alpha=2.0 * c.rank)
    parts = parts_of(lab)
    for part in parts:
        shapes = spec.shapes(lab.site(LAYER, part["role"]))
        part["adapter"] = sum(a * b for a, b in shapes.values())
        part |= {"A": list(shapes["A"]), "B": list(shapes["B"])}
    chosen = next(p for p in parts if p["role"] == c.part)
    extra = 0 if c.merged else chosen["adapter"]
    site = lab.site(LAYER, c.part)
    weight, x = lab.weight(LAYER, c.part), lab.inputs()[site.name]
    params = spec.init(site, Start(rng=torch.Generator().manual_seed(4)))
    params["B"] = normal(*params["B"].shape, seed=5) * 0.01
    after, _ = merged(spec.lower(site, params, lab.model.places.weights[site.name]), weight)
    beside = weight @ x + spec.scale_at(site) * (params["B"] @ (params["A"] @ x))
    differ = float((after @ x - beside).norm() / beside.norm())
    total = sum(p["adapter"] for p in parts)
    block = sum(p["parameters"] for p in parts)
    return {
        "numbers": [
            number("shape", f"W of {c.part}", f"{chosen['out']} x {chosen['in']}"),
            number("frozen", "numbers in W, frozen", chosen["parameters"]),
            number("adapter", "numbers in A and B", chosen["adapter"]),
            number("extra", "extra multiplications a token", extra),
            number("share", "adapters, share of the block", total / block, percent(total / block)),
            number("differ", "merged and beside differ by", differ, f"{differ:.1e}"),
        ],
        "data": {"parts": parts, "part": c.part, "merged": c.merged, "rank": c.rank},
    }


# 12: where methods live ---------------------------------------------------------------------------------


def methods_controls(lab: Lab) -> type[Controls]:
    """One switch for each method."""
    both = {"lora", "ia3", "prefix"}
    return controls(
        "Picture12",
        **{
            key: switch(
                key in ("lora", "prefix"), label, (False, True) if key in both else (key in ("lora", "prefix"),)
            )
            for key, (label, _) in SHOWN.items()
        },
    )


def counted(lab: Lab, key: str) -> dict[str, Any]:
    """Where a method's numbers are: in the block that is drawn, in front of the sequence, and in all.

    BitFit on a base without biases is counted with the biases that it adds.
    """
    return lab.keep(("counted", key), lambda: _count(lab, key))


def keep_counted(lab: Lab, key: str) -> None:
    """Count before anybody asks, without holding up those who ask for something else."""
    made = _count(lab, key)
    lab.keep(("counted", key), lambda: made)


def _count(lab: Lab, key: str) -> dict[str, Any]:
    config, folder = find_config(lab.base)
    spec = SHOWN[key][1]
    if key == "bitfit" and not any(s.has_bias for s in lab.linear.values()):
        spec = BitFit(add=True)
    model = planned_model(Base(lab.base, config, folder), spec)
    made = next(iter(model.adapters.values()))
    places: Counter[str] = Counter()
    for name, params in made.sites.items():
        site = made.places[name]
        size = sum(t.numel() for t in params.values())
        if isinstance(site, VirtualSite):
            places["front"] += size
        elif isinstance(site, BlockSite):
            places[f"after {site.part}"] += size if site.layer == LAYER else 0
        elif site.layer == LAYER:
            places[site.role] += size
    total = sum(t.numel() for t in model.trainable().values())
    norms = sum(t.numel() for n, t in made.swaps.items() if f".{LAYER}." in n)
    if norms:
        places["norms"] += norms
    return {"places": {p: n for p, n in places.items() if n}, "total": total}


def methods(lab: Lab, c: Any) -> Plain:
    """Which parts of a block light up for the methods that are switched on, and how many numbers they train."""
    full = lab.sizes[lab.label]
    rows = [{"key": key, "label": label, **counted(lab, key)} for key, (label, _) in SHOWN.items() if getattr(c, key)]
    return {
        "numbers": [
            number(row["key"], row["label"], row["total"], f"{row['total']:,} ({percent(row['total'] / full, 3)})")
            for row in rows
        ]
        or [number("none", "nothing trains", 0)],
        "data": {"parts": parts_of(lab), "methods": rows},
    }
