"""The rules of thumb that articles print, each with its assumptions, for the base and adapter that are planned."""

from __future__ import annotations

from typing import Any

from deltaw.plan.plan import Counts


def rules_of_thumb(counts: Counts) -> tuple[dict[str, Any], ...]:
    """[{"rule", "bytes", "assumes"}]: what each rule gives for these counts. None counts activations or the process.

    Sources: mixed precision AdamW, 16 bytes a parameter (arXiv:1910.02054 section 3.1); QLoRA (arXiv:2305.14314).
    """
    p, a = counts.parameters, counts.trainable
    rows = [
        ("full, 4 bytes a parameter", 4 * p, "float32 weights alone: no gradient, no optimizer; inference"),
        ("full, 8 bytes a parameter", 8 * p, "float32 weights and gradients, plain SGD without momentum"),
        ("full, 16 bytes a parameter", 16 * p, "mixed precision AdamW: 2 weights, 2 gradients, 12 for the float32 "
         "master weights and two moments; ours in float32: 4 weights, 4 gradients, 8 moments, the same sum"),
        ("LoRA, 2 P", 2 * p, "16-bit weights alone, the adapter forgotten"),
        ("LoRA, 2 P + 16 P_lora", 2 * p + 16 * a, "16-bit base that is only read; 16 bytes for each adapter parameter"),
        ("QLoRA, P / 2", p // 2, "4-bit codes of every parameter: no scales, and as if head and embeddings were in "
         "4 bits too"),
        ("QLoRA, P / 2 + 0.127 P / 8 + 16 P_lora", round(p / 2 + 0.127 * p / 8) + 16 * a,
         "the same with double-quantised scales (0.127 bits a parameter) and the adapter"),
    ]  # fmt: skip
    return tuple({"rule": name, "bytes": size, "assumes": why} for name, size, why in rows)
