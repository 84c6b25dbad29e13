"""A folder for HF PEFT alone: its two files, every scale said as alpha / rank, nothing of ours beside them.

`Adapter.save` writes the same layout with deltaw.json, which PEFT leaves alone; this is for tools that do not, or that
read alpha and rank and nothing else.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from deltaw.core.adapter import Adapter
from deltaw.core.misfits import not_finite, some
from deltaw.core.spec import MethodSpec
from deltaw.errors import AdapterError
from deltaw.export.opened import instead, refuse, refuse_taken
from deltaw.methods.lowrank import LowRank
from deltaw.store.files import whole_folder
from deltaw.store.peft import CONFIG, TENSORS, adapter_folder, read_adapter, to_peft_config, to_peft_tensors

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class FolderReport:
    """What was written.

    rank, alpha   those of the config; None for a method without
    n_apart       maps with a rank or an alpha of their own
    max_lora_rank what `vllm serve` must be given at least; None for PEFT's folder
    """

    out: str
    adapter: str
    method: str
    rank: int | None
    alpha: float | None
    n_apart: int
    max_lora_rank: int | None
    n_tensors: int
    size_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def export_peft(adapter: str | Path | Adapter, out: str | Path) -> FolderReport:
    """Write `adapter` as a folder that PEFT reads, whole or not at all; `out` must not be there yet.

    PEFT computes what deltaw computes. Raises AdapterError that lists what PEFT cannot say, RunError, WorkFailed.
    """
    out = Path(out)
    refuse_taken(out)
    beside: list[Path] = []
    if not isinstance(adapter, Adapter):
        folder = adapter_folder(adapter)
        adapter = read_adapter(folder)
        beside = [folder / name for name in TOKENIZER if (folder / name).is_file()]
    if bad := not_finite(adapter.tensors()):
        raise AdapterError(f"The adapter holds NaN or Inf in {some(bad)}: take an earlier checkpoint.")
    spec, problems = adapter.spec, []
    if spec.peft_type is None or not spec.in_peft:
        problems.append(f"method {spec.name!r} is not in PEFT")
    if adapter.overrides:
        problems.append(f"settings of the base are changed: {', '.join(sorted(adapter.overrides))}")
    if spec.new_tokens and not beside:
        problems.append(f"new tokens ({', '.join(spec.new_tokens)}) need a tokenizer, and none lies beside the adapter")
    merge = instead(adapter, "Write the whole model instead: deltaw merge.")
    refuse(problems, "PEFT cannot say what this adapter does", merge, AdapterError)
    said, n_apart = explicit(adapter)
    return write_peft(said, out, beside, method=spec.name, origin=adapter.id, n_apart=n_apart)


def explicit(adapter: Adapter) -> tuple[Adapter, int]:
    """The same adapter with alpha / rank for every scale, and how many maps differ from the common pair.

    rsLoRA's alpha / sqrt(rank) becomes alpha * sqrt(rank) over rank; patterns become one entry a map.
    """
    spec = adapter.spec
    if not isinstance(spec, LowRank):
        return adapter, 0
    pairs = {
        p.name: (adapter.sites[p.name]["A"].shape[0], spec.scale_at(p) * adapter.sites[p.name]["A"].shape[0])  # type: ignore[arg-type]
        for p in adapter.places
        if "A" in adapter.sites[p.name]
    }
    if not pairs:
        return adapter, 0
    (rank, alpha), _ = Counter(pairs.values()).most_common(1)[0]
    update = {
        "rank": rank,
        "alpha": alpha,
        "rslora": False,
        "rank_pattern": {name: r for name, (r, _) in pairs.items() if r != rank},
        "alpha_pattern": {name: a for name, (_, a) in pairs.items() if a != alpha},
    }
    apart = sum(pair != (rank, alpha) for pair in pairs.values())
    return replace(adapter, spec=spec.model_copy(update=update)), apart


def write_peft(
    adapter: Adapter, out: Path, beside: list[Path], *, method: str, origin: str, n_apart: int = 0,
    max_lora_rank: int | None = None,
) -> FolderReport:  # fmt: skip
    """Write PEFT's two files, and copies of `beside`, into the new folder `out`."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in to_peft_tensors(adapter).items()}
    config = to_peft_config(adapter)
    with whole_folder(out) as aside:
        save_file(tensors, aside / TENSORS, metadata={"format": "pt"})
        (aside / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in beside:
            (aside / path.name).write_bytes(path.read_bytes())
        size = (aside / TENSORS).stat().st_size
        refuse_taken(out)  # by another process, in the meantime
    spec: MethodSpec | None = adapter.spec
    return FolderReport(
        out=str(out),
        adapter=origin,
        method=method,
        rank=getattr(spec, "rank", None),
        alpha=getattr(spec, "alpha", None),
        n_apart=n_apart,
        max_lora_rank=max_lora_rank,
        n_tensors=len(tensors),
        size_bytes=size,
    )
