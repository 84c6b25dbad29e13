"""The Prefix normal form: learned vectors in front of the sequence, which the model reads as if they were tokens.

    inputs        [stacks, n, width]                in front of the token embeddings (prompt tuning, P-tuning)
    keys, values  [layers, n, heads, head_dim]      in front of each layer's keys and values (prefix tuning); keys are
                                                    as attention sees them, after any rotation

Tokens count their positions from n. In a pack every document has the vectors before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltaw.core.site import VirtualSite
from deltaw.errors import ShapeError


@dataclass(frozen=True)
class Prefix:
    """Vectors in front of the sequence: `inputs`, or `keys` and `values`."""

    inputs: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def n(self) -> int:
        """How many positions it takes."""
        found = self.inputs if self.inputs is not None else self.keys
        return 0 if found is None else found.shape[1]

    def to(self, dtype: torch.dtype) -> Prefix:
        """The same vectors in `dtype`, in which the base computes."""
        parts = ("inputs", "keys", "values")
        return Prefix(**{p: None if (t := getattr(self, p)) is None else t.to(dtype) for p in parts})


def check_prefix(form: Prefix, site: VirtualSite) -> None:
    """Raise ShapeError unless `form` fits `site`."""
    of_layer = (site.n_layers, form.n, site.n_heads, site.head_dim)
    wanted = {"inputs": (site.stacks, form.n, site.width), "keys": of_layer, "values": of_layer}
    parts = ("inputs",) if site.kind == "input" else ("keys", "values")
    for part in parts:
        value = getattr(form, part)
        if value is None or tuple(value.shape) != wanted[part]:
            found = None if value is None else tuple(value.shape)
            raise ShapeError(f"{site.name}: {part} has shape {found}, this model needs {wanted[part]}.")
