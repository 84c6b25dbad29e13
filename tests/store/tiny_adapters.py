"""Finished adapters without a base: small, random, told apart by their seed."""

from __future__ import annotations

import torch

from deltaw.core.adapter import Adapter
from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.site import LinearSite
from deltaw.methods.lora import Lora

BASE = BaseFingerprint(
    name="Tiny-1", weights="9f0c21aa" * 8, architecture="11ab34cd" * 8, model_type="llama", tokenizer="77aa0011" * 8,
    chat_template="c0ffee00" * 8, parameters=1234,
)  # fmt: skip
NAME = "model.layers.0.self_attn.q_proj"
SPEC = Lora(rank=3, alpha=5, targets=["q_proj"])


def tiny(seed: int, fingerprint: BaseFingerprint | None = BASE, **provenance: object) -> Adapter:
    """LoRA at one map of 7 inputs and 5 outputs."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {"A": torch.randn(3, 7, generator=rng), "B": torch.randn(5, 3, generator=rng)}
    site = LinearSite(NAME, 7, 5, "linear", True)
    return Adapter(SPEC, {NAME: tensors}, (site,), fingerprint=fingerprint, provenance=dict(provenance))
