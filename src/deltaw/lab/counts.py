"""Pictures 2, 5, 8 and 11: what is counted, stored and held in memory. Everything follows from shapes (deltaw.plan)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from deltaw.core.site import LinearSite
from deltaw.lab.base import Lab
from deltaw.lab.controls import Controls, choice, controls, slider, switch
from deltaw.lab.picture import Plain, number, percent
from deltaw.methods import Lora
from deltaw.plan.plan import CAUSES, Counts, Plan
from deltaw.plan.rules import rules_of_thumb
from deltaw.train.planning import Planner, Work
from deltaw.train.recipe import load_recipe

TARGETS = ("all-linear", "q_proj,v_proj", "q_proj,k_proj,v_proj,o_proj")
CARDS = (24, 48, 80)
"""GB (10^9 bytes) of single GPUs that people have."""
METHODS_OF_11: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"method": "full"}},
    "LoRA": {"adapter": {"method": "lora"}},
    "QLoRA": {"adapter": {"method": "lora"}, "base": {"format": "nf4", "double_quant": True}},
}
"""As `deltaw plan --method full|lora|qlora` has them."""


def gigabytes(size: float) -> str:
    """Bytes as the page shows them, in GB (10^9 bytes) or MB."""
    if size >= 1e12:
        return f"{size / 1e12:.2f} TB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def lora(rank: int, targets: str) -> Lora:
    """LoRA of a rank at the targets as a control names them."""
    return Lora(rank=rank, alpha=2.0 * rank, targets=targets if targets == "all-linear" else tuple(targets.split(",")))


def model_control(lab: Lab, default: str, recorded: tuple[str, ...] = ()) -> Any:
    """A control over this base and every shape that is shipped, by size."""
    return choice(default, list(lab.sizes), "model", recorded, ordered=True)


# 2: parameter efficiency --------------------------------------------------------------------------------


def efficiency_controls(lab: Lab) -> type[Controls]:
    """Model, rank and targets."""
    return controls(
        "Picture2",
        model=model_control(lab, "llama-7b", (lab.label, "llama-7b", "llama-70b")),
        rank=slider(8, 1, 256, "rank r", (4, 8, 16, 64, 256)),
        targets=choice(TARGETS[0], TARGETS, "targets", TARGETS[:2]),
    )


def efficiency(lab: Lab, c: Any) -> Plain:
    """Numbers in the base and in the adapter, by kind of linear map."""
    trained = lab.trained(c.model, lora(c.rank, c.targets))
    net = lab.shape(c.model)
    rows: dict[str, dict[str, Any]] = {}
    for name, site in net.places.sites.items():
        if site.kind == "embedding" or site.is_head:
            continue
        row = rows.setdefault(site.role, {"role": site.role, "maps": 0, "full": 0, "adapter": 0})
        row["maps"] += 1
        row["full"] += site.in_features * site.out_features
        row["adapter"] += trained.get(name, 0)
    full, adapter = lab.sizes[c.model], sum(trained.values())
    rest = full - sum(row["full"] for row in rows.values())
    rows["others"] = {"role": "the rest", "maps": 0, "full": rest, "adapter": 0}
    return {
        "numbers": [
            number("full", "numbers in the model", full),
            number("adapter", "numbers that LoRA trains", adapter),
            number("percent", "share", 100 * adapter / full, percent(adapter / full, 3)),
            number("file", "adapter's file, float32", 4 * adapter, gigabytes(4 * adapter)),
        ],
        "data": {"rows": list(rows.values()), "model": c.model},
    }


# 5: cost of full fine-tuning ----------------------------------------------------------------------------


def cost_controls(lab: Lab) -> type[Controls]:
    """Model, number of tasks, rank."""
    return controls(
        "Picture5",
        model=model_control(lab, "llama-7b", (lab.label, "llama-7b", "llama-70b")),
        tasks=slider(10, 1, 100, "tasks", (1, 10, 100)),
        rank=slider(16, 1, 256, "rank r", (8, 16, 64)),
    )


def cost(lab: Lab, c: Any) -> Plain:
    """Memory to train and storage to keep: a copy of the model for each task, or one base and an adapter for each."""
    full = lab.sizes[c.model]
    adapter = sum(lab.trained(c.model, lora(c.rank, "all-linear")).values())
    rules = {r["rule"]: r for r in rules_of_thumb(Counts(full, adapter, 0, 0, 0, 0))}
    memory = [rules["full, 16 bytes a parameter"], rules["LoRA, 2 P + 16 P_lora"]]
    copies, one_base = c.tasks * 2 * full, 2 * full + c.tasks * 4 * adapter
    return {
        "numbers": [
            number("memory_full", "memory, full", memory[0]["bytes"], gigabytes(memory[0]["bytes"])),
            number("memory_lora", "memory, LoRA", memory[1]["bytes"], gigabytes(memory[1]["bytes"])),
            number("copies", f"disk, {c.tasks} copies", copies, gigabytes(copies)),
            number("adapters", f"disk, 1 base and {c.tasks} adapters", one_base, gigabytes(one_base)),
            number("times", "times less disk", copies / one_base, f"{copies / one_base:.1f}"),
        ],
        "data": {
            "memory": [{"name": n, **row} for n, row in zip(("full", "LoRA"), memory, strict=True)],
            "storage": [
                {"tasks": t, "copies": t * 2 * full, "adapters": 2 * full + t * 4 * adapter}
                for t in sorted({*range(0, 101, 5), c.tasks} - {0} | {1})
            ],
            "tasks": c.tasks,
        },
    }


# 8: trainable fraction -------------------------------------------------------------------------------------


def fraction_controls(lab: Lab) -> type[Controls]:
    """Rank and width of one square matrix."""
    return controls(
        "Picture8",
        rank=slider(8, 1, 512, "rank r", (1, 4, 8, 16, 64, 256)),
        d=slider(4096, 64, 16384, "width d", (576, 4096, 8192)),
    )


def square(rank: int, d: int) -> int:
    """The numbers that LoRA trains at a square matrix: 2 d r."""
    parts = Lora(rank=rank, alpha=2.0 * rank).shapes(LinearSite("square", d, d))
    return sum(rows * columns for rows, columns in parts.values())


def trainable_fraction(lab: Lab, c: Any) -> Plain:
    """2 r / d: the share of one square matrix that trains."""
    trained, full = square(c.rank, c.d), c.d * c.d
    ranks = sorted({1, 2, 4, 8, 16, 32, 64, 128, 256, 512, c.rank})
    return {
        "numbers": [
            number("full", "numbers in W", full),
            number("trained", "numbers in A and B", trained),
            number("percent", "share, 2 r / d", 100 * trained / full, percent(trained / full)),
            number("times", "times fewer", full / trained, f"{full / trained:,.1f}"),
        ],
        "data": {
            "curve": [{"rank": r, "share": square(r, c.d) / full} for r in ranks],
            "rank": c.rank,
            "d": c.d,
            "share": trained / full,
        },
    }


# 11: memory by method -----------------------------------------------------------------------------------------


def memory_controls(lab: Lab) -> type[Controls]:
    """Model, rank, rows of a step and their length, and whether blocks are computed again."""
    return controls(
        "Picture11",
        model=model_control(lab, "llama-7b", (lab.label, "llama-7b", "llama-70b")),
        rank=slider(16, 1, 256, "rank r"),
        batch=slider(4, 1, 16, "rows of a step"),
        length=choice("512", ("128", "256", "512", "1024"), "tokens of a row", ordered=True),
        again=switch(False, "compute blocks again in the backward", (False, True)),
    )


def planned(lab: Lab, c: Any, method: str) -> Plan:
    """What `deltaw plan` says of one method."""
    part = METHODS_OF_11[method]
    adapter = dict(part["adapter"]) | ({} if method == "full" else {"rank": c.rank})
    length = int(c.length)
    recipe = load_recipe(
        {
            "base": {"path": lab.path(c.model), **part.get("base", {})},
            "adapter": adapter,
            "train": {"checkpointing": c.again, "tokens_per_step": c.batch * length},
        }
    )
    with lab.planning:
        return Planner(recipe, Work.of_rows(c.batch, length), kept=lab.planned).plan()


def memory(lab: Lab, c: Any) -> Plain:
    """Bytes by cause at the peak of a run, for full fine-tuning, LoRA and QLoRA."""
    return _memory(c, {method: planned(lab, c, method) for method in METHODS_OF_11})


def memory_soon(lab: Lab, c: Any) -> Plain:
    """The same as far as it is planned by now: `pending` names the methods that are not."""
    return _memory(c, lab.soon.get(c, {method: partial(planned, lab, c, method) for method in METHODS_OF_11}))


def _memory(c: Any, plans: Mapping[str, Plan]) -> Plain:
    bars, numbers = [], []
    for method in METHODS_OF_11:
        if method not in plans:
            numbers.append(number(method, f"{method}: peak", "", "being computed"))
            continue
        plain = plans[method].plain()
        fits = [card for card in CARDS if plain["needed_bytes"] <= card * 1e9]
        where = f"fits {fits[0]} GB" if fits else f"over {CARDS[-1]} GB"
        numbers.append(
            number(method, f"{method}: peak", plain["peak_bytes"], f"{gigabytes(plain['peak_bytes'])}, {where}")
        )
        kept = {"bytes": plain["bytes"], "peak": plain["peak_bytes"], "moment": plain["peak_moment"]}
        bars.append({"method": method, "dtype": plain["settings"]["dtype"], **kept})
    pending = [method for method in METHODS_OF_11 if method not in plans]
    shown = {"causes": [*CAUSES, "file"], "cards": list(CARDS), "model": c.model, "methods": list(METHODS_OF_11)}
    return {"numbers": numbers, "data": {"bars": bars, "pending": pending, **shown}}
