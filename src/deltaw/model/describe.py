"""What a base is: architecture, sizes, fingerprint, and its linear maps by role. No weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deltaw.core.checkpoint_files import checkpoint_files, read_json
from deltaw.core.fingerprint import SOURCE_FILE, fingerprint_folder
from deltaw.core.site import LinearSite
from deltaw.errors import BaseError
from deltaw.model.empty import empty_network
from deltaw.model.kinds import has_head, kind_of, labels_of, wants_labels
from deltaw.model.load import folder_format, refuse_unsupported, resolve_base
from deltaw.model.sites import find_sites
from deltaw.model.starter import Say

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def describe_base(path: str | Path, say: Say | None = None) -> dict[str, Any]:
    """A base (what resolve_base takes) as plain data. Raises BaseError."""
    folder = resolve_base(path, say=say)
    fingerprint = fingerprint_folder(folder)
    plain = read_json(folder / "config.json")
    headless = wants_labels(plain) and not has_head(plain)
    net = empty_network(folder, ("LABEL_0", "LABEL_1") if headless else None)
    config = net.config.get_text_config()
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    format, unsupported = fingerprint.format, None
    try:
        format = str(folder_format(folder) or "dense")
        refuse_unsupported(net, attention_only=False)
    except BaseError as error:
        unsupported = str(error)
    n_own = fingerprint.parameters if format == "dense" else sum(p.numel() for p in net.parameters())
    return {
        "kind": "base",
        "path": str(folder),
        "name": fingerprint.name,
        "architecture": type(net).__name__,
        "model_type": fingerprint.model_type,
        "task": kind_of(net) + (" (with labels that you give)" if headless else ""),
        **({"labels": list(labels_of(net))} if labels_of(net) and not headless else {}),
        "n_parameters": n_own,
        "format": format,
        **({"calibration": told} if (told := _calibration(folder)) else {}),
        "dtype": fingerprint.dtype,
        "size_mb": round(sum(f.stat().st_size for f in checkpoint_files(folder)) / 1e6, 3),
        "sizes": {k: v for k in SIZES if (v := getattr(config, k, None)) is not None},
        "tied": bool(head is not None and head.weight is embedding.weight),
        "has_tokenizer": bool(fingerprint.tokenizer),
        "has_chat_template": bool(fingerprint.chat_template),
        "unsupported": unsupported,
        "linear_maps": _by_role(find_sites(net).values()),
        "fingerprint": fingerprint.model_dump(),
    }


def _calibration(folder: Path) -> dict[str, Any]:
    """What the codes of a folder were chosen for, where its maker wrote that down."""
    note = read_json(folder / SOURCE_FILE) if (folder / SOURCE_FILE).is_file() else {}
    found = note.get("calibration")
    return found if isinstance(found, dict) else {}


def _by_role(sites: Iterable[LinearSite]) -> list[dict[str, Any]]:
    """Sites of the same role, kind and size counted together, in the model's order."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for site in sites:
        row = {
            "role": site.role,
            "kind": site.kind,
            "out_features": site.out_features,
            "in_features": site.in_features,
            "bias": site.has_bias,
            "head": site.is_head,
        }
        entry = found.setdefault(tuple(row.values()), {**row, "count": 0})
        entry["count"] += 1
    return list(found.values())
