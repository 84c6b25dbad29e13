"""A finished adapter: immutable, identified by what is in it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deltaw.core.fingerprint import BaseFingerprint
from deltaw.core.site import Site
from deltaw.core.spec import MethodSpec


@dataclass(frozen=True)
class Replacement:
    """A base tensor, or some of its rows, that the adapter swaps.

    tensor   the base's name for it: "model.norm.weight"
    value    the whole tensor, or [n, dim] rows
    rows     the row numbers that `value` holds, in order; None: `value` is the whole tensor
    """

    tensor: str
    value: Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Adapter:
    """What training made, ready to save, attach or merge.

    spec         the method and its settings
    sites        parameters by site name and parameter name, float32 as a rule
    shared       parameters of the whole adapter, which every site reads
    replaced     whole tensors or rows that it swaps
    overrides    settings of the base's config that it needs (a rescaled RoPE)
    fingerprint  the base it was trained on; None for a foreign adapter that does not say
    provenance   recipe, data hash, versions, metrics, seed: never part of the identity
    """

    spec: MethodSpec
    sites: dict[str, dict[str, Tensor]]
    places: tuple[Site, ...] = ()
    shared: dict[str, Tensor] = field(default_factory=dict)
    replaced: tuple[Replacement, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    fingerprint: BaseFingerprint | None = None
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """SHA-256 over spec, fingerprint and tensors; times and metrics do not count."""
        digest = hashlib.sha256()
        for part in (
            json.dumps(self.spec.model_dump(mode="json"), sort_keys=True),
            "" if self.fingerprint is None else self.fingerprint.model_dump_json(),
            *([json.dumps(self.overrides, sort_keys=True)] if self.overrides else []),
        ):
            digest.update(len(part).to_bytes(8, "big") + part.encode())
        for name, tensor in sorted(self.tensors().items()):
            raw = tensor.detach().cpu().contiguous()
            head = f"{name}|{raw.dtype}|{tuple(raw.shape)}"
            digest.update(len(head).to_bytes(8, "big") + head.encode())
            if raw.numel():
                digest.update(raw.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a unique name; row numbers are part of a replaced tensor's name."""
        named = {f"{site}:{p}": t for site, params in self.sites.items() for p, t in params.items()}
        named |= {f"shared:{p}": t for p, t in self.shared.items()}
        for r in self.replaced:
            rows = "" if r.rows is None else json.dumps(r.rows)
            named[f"replace:{r.tensor}:{rows}"] = r.value
        return named

    @property
    def n_parameters(self) -> int:
        """How many numbers the adapter holds."""
        return sum(t.numel() for t in self.tensors().values())

    def save(self, folder: Any) -> None:
        """Write PEFT's layout plus deltaw.json into `folder`, whole or not at all."""
        from deltaw.store.peft import write_adapter  # store stands above core; a door, not a dependency

        write_adapter(self, folder)
