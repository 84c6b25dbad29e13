"""The model card of an adapter: README.md with YAML front matter, as the Hugging Face hub reads it."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from deltaw.core.adapter import Adapter

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def short_card(adapter: Adapter, base: str | None) -> str:
    """The card of a saved adapter."""
    front = {"library_name": "peft", "base_model": base or "unknown", "tags": [adapter.spec.name, "deltaw"]}
    print_ = adapter.fingerprint.short() if adapter.fingerprint else "unknown"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# Adapter {adapter.id[:12]}\n\n"
        f"Method {adapter.spec.name}, {adapter.n_parameters:,} parameters, trained on {print_}. "
        f"Load it with deltaw{' or HF PEFT' if adapter.spec.in_peft else ''}.\n"
    )


def model_card(adapter: Adapter, title: str) -> str:
    """The card of a pushed one: base_model, library_name, tags and metrics in front, then what made the adapter.

    title  of the page, as in "support@3"
    """
    note, print_ = adapter.provenance, adapter.fingerprint
    named = note.get("base_model_name_or_path") or note.get("base") or ""
    base = named if _HUB_ID.fullmatch(named) and "/" in named else print_.name if print_ else None
    metrics = {k: v for k, v in (note.get("metrics") or {}).items() if isinstance(v, int | float)}
    front: dict[str, Any] = {
        **({"base_model": base} if base and _HUB_ID.fullmatch(base) else {}),
        "library_name": "peft",
        "tags": ["deltaw", adapter.spec.name],
        **({"metrics": sorted(metrics)} if metrics else {}),
    }
    rows = {
        "id": f"`{adapter.id}`",
        "method": adapter.spec.name,
        "parameters": f"{adapter.n_parameters:,}",
        "base": f"{print_.short()} ({print_.parameters:,} parameters)" if print_ else named or "unknown",
        "base weights (SHA-256)": f"`{print_.weights}`" if print_ else None,
        "data (SHA-256)": f"`{note['data_hash']}`" if note.get("data_hash") else None,
        "made from": ", ".join(f"`{p[:12]}`" for p in note.get("parents", [])) or None,
        **{name: f"{value:.6g}" for name, value in metrics.items()},
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value is not None)
    settings = json.dumps(adapter.spec.model_dump(mode="json", exclude_defaults=True))
    loads = "deltaw or HF PEFT" if adapter.spec.in_peft else "deltaw"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n"
        f"Settings: `{settings}`\n\nLoad it with {loads}.\n"
    )
