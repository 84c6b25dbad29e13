"""A finished adapter made ready to be computed beside others, row by row: what serving holds of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from deltaw.core.adapter import Adapter
from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.core.prefix import Prefix
from deltaw.core.site import VirtualSite
from deltaw.core.spec import Form
from deltaw.errors import AdapterError
from deltaw.model.attachment import Attachment
from deltaw.model.model import Model
from deltaw.model.virtual import front_of


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

    def put_in(self, model: Model, key: str) -> None:
        """Let the model's hosts compute with it on rows that `Run.route` gives to `key`."""
        model.installed.install(key, self.made, self.forms)

    def take_out(self, model: Model, key: str) -> None:
        """The other way; the last one out leaves the base's own modules behind."""
        model.installed.remove(key)


def settle(model: Model, adapter: Adapter, *, allow_other_base: bool = False) -> Resident:
    """Match a finished adapter with the model, strictly, and make its normal forms once. The model is not changed.

    Raises AdapterError for what does not fit, and for what rows of one batch cannot differ in: settings of the base's
    config (a rescaled RoPE).
    """
    if adapter.spec.trains_base:
        raise AdapterError("A fully fine-tuned model is a base of its own: load it with load_base and serve that.")
    if adapter.overrides:
        raise AdapterError(
            f"The adapter sets {', '.join(sorted(adapter.overrides))} of the base's config, which requests of one "
            "batch share: merge it into a base of its own, and serve that."
        )
    made, tokenizer = model.matched(adapter, allow_other_base)
    made.to(model.device)
    with torch.no_grad():
        front = front_of([made], model.places, model.net)
        places = [name for name, site in made.places.items() if not isinstance(site, VirtualSite)]
        dtype = model.net.dtype  # transformers looks through all parameters for it
        forms = {name: _ready(made.lowered(name, model.places), dtype) for name in places}
    return Resident(adapter.id, made, forms, front, tokenizer)


def _ready(form: Form, dtype: torch.dtype) -> Form:
    """The form as serving computes it. Gains stay as they are: it is their distance from one that is rounded."""
    if isinstance(form, Affine):
        b = None if form.B is None else (form.B * form.scale).to(dtype)
        a = None if form.A is None else form.A.to(dtype).contiguous()
        return replace(form, A=a, B=b, scale=1.0, bias=None if form.bias is None else form.bias.to(dtype))
    assert isinstance(form, Bottleneck)
    parts = ("down", "up", "down_bias", "up_bias")
    return replace(form, **{p: getattr(form, p).to(dtype) for p in parts})
