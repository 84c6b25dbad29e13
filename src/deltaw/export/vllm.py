"""A folder that vLLM and LoRAX load beside a base.

Both read r, lora_alpha and target_modules of PEFT's config. LoRAX, and vLLM before it learnt rank_pattern and
alpha_pattern, drop what says more, so here every map gets one rank and one alpha: smaller ranks are filled up with
zeros, scales that differ are folded into B, and alpha is a whole number. What they do not load at all is named and
refused.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deltaw.core.adapter import Adapter
from deltaw.core.misfits import some
from deltaw.errors import AdapterError, BadInput
from deltaw.export.factors import Factors, common_alpha, factors_of, folded, padded, refuse_empty
from deltaw.export.opened import Opened, Say, instead, opened, refuse, refuse_taken
from deltaw.export.peft import FolderReport, write_peft
from deltaw.methods.lora import Lora

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (MaxLoRARanks in vllm/config/lora.py)."""

MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The maps of these architectures that both give adapters to."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""`model_type`s that vLLM serves with adapters and whose maps bear the names above."""


def export_vllm(
    base: str | Path,
    adapter: str | Path | Adapter,
    out: str | Path,
    *,
    max_rank: int | None = None,
    allow_other_base: bool = False,
    say: Say | None = None,
) -> FolderReport:
    """Write `adapter` as a folder that vLLM and LoRAX load for `base`, whole or not at all.

    out       a folder that is not there yet
    max_rank  the server's --max-lora-rank; None: the least that it can be is in the report

    Raises AdapterError that lists what they do not load, BadInput (a max_rank that vLLM does not take), BaseMismatch,
    BaseError, RunError, WorkFailed.
    """
    out = Path(out)
    refuse_taken(out)
    if max_rank is not None and max_rank not in MAX_RANKS:
        raise BadInput(f"vLLM takes no --max-lora-rank {max_rank}: it is one of {', '.join(map(str, MAX_RANKS))}.")
    with opened(base, adapter, allow_other_base, say) as found:
        assert found.adapter is not None
        factors, problems = factors_of(found)
        problems += _limits(found, factors, max_rank)
        merge = instead(found.adapter, "Or serve a whole model: deltaw merge.")
        refuse(problems, "vLLM and LoRAX do not load this adapter", merge, AdapterError)
        refuse_empty(factors)
        served, n_apart = _uniform(found.adapter, factors)
        rank = max(f.rank for f in factors)
        least = next(r for r in MAX_RANKS if r >= rank)
        method, origin = found.adapter.spec.name, found.adapter.id
        return write_peft(served, out, [], method=method, origin=origin, n_apart=n_apart, max_lora_rank=least)


def _limits(found: Opened, factors: list[Factors], max_rank: int | None) -> list[str]:
    """What the two servers' limits forbid, a sentence each."""
    problems = []
    kind = str(found.source.net.config.model_type)
    if kind not in ARCHITECTURES:
        problems.append(
            f"architecture {kind!r} is not among those known here to take adapters: {', '.join(ARCHITECTURES)}"
        )
    elif odd := [f.site.name for f in factors if f.site.role not in MAPS]:
        problems.append(f"{some(odd, most=12)}: adapters sit at {', '.join(MAPS)} only; train without them")
    most = max_rank or MAX_RANKS[-1]
    if large := [f for f in factors if f.rank > most]:
        worst = max(f.rank for f in large)
        problems.append(
            f"rank {worst} at {some([f.site.name for f in large])}: the most is {most}; make it smaller first: "
            f"deltaw compress --rank {most}"
        )
    return problems


def _uniform(adapter: Adapter, factors: list[Factors]) -> tuple[Adapter, int]:
    """A plain LoRA of one rank and one whole alpha with the same products, and how many maps that changed."""
    rank = max(f.rank for f in factors)
    alike = [replace(f, A=A, B=B) for f in factors for A, B in [padded(f.A, f.B, rank)]]
    alpha = common_alpha(alike)
    alpha = alpha if alpha == int(alpha) else float(rank)
    roles = tuple(sorted({f.site.role for f in factors}))
    sites = {f.site.name: {"A": f.A, "B": folded(f, alpha, rank)} for f in alike}
    served = replace(
        adapter,
        spec=Lora(rank=rank, alpha=alpha, targets=roles),
        sites=sites,
        places=tuple(f.site for f in factors),
        shared={},
        replaced=(),
    )
    return served, sum(f.rank != rank or f.scale * rank != alpha for f in factors)
