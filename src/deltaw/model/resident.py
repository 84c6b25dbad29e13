"""A finished adapter made ready to be computed beside others, row by row: what serving holds of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.core.prefix import Prefix
from deltaw.core.spec import Form
from deltaw.errors import AdapterError
from deltaw.model.attachment import Attachment
from deltaw.model.model import Model


@dataclass(frozen=True)
class Resident:
    """One adapter, settled.

    id         its content hash
    made       its tensors, matched with the model
    forms      normal forms by place, in the base's dtype, the scale of low-rank factors folded into B (scale 1)
    front      its vectors in front of the sequence, or None
    tokenizer  the base's, with its new tokens
    """

    id: str
    made: Attachment
    forms: dict[str, Form]
    front: Prefix | None
    tokenizer: Any

    @property
    def n_before(self) -> int:
        """The positions that its virtual tokens take."""
        return 0 if self.front is None else self.front.n
