"""Full fine-tuning: every weight of the base trains. The baseline every method is compared with.

There is no normal form: modules stay as they are and the base itself changes, so nothing can be detached.
The result is saved as a whole model. Count: every parameter of the base.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec, Params, Start
from deltaw.core.weight import Weight


class Full(MethodSpec):
    """Settings of full fine-tuning: none of its own."""

    name: ClassVar[str] = "full"
    lr: ClassVar[float] = 1e-4
    trains_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    batchable: ClassVar[bool] = False
    formats: ClassVar[tuple[str, ...] | None] = ("dense",)

    @model_validator(mode="after")
    def _has_no_settings(self) -> Full:
        given = [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]
        if given := [key for key in given if key not in ("method", "targets")] + (
            ["targets"] if self.targets != "all-linear" else []
        ):
            raise ValueError(f"trains every weight and has no settings; remove {', '.join(sorted(given))}")
        return self

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        return {}

    def init(self, site: LinearSite, start: Start) -> Params:
        return {}

    def lower(self, site: LinearSite, params: Params, weight: Weight, bias: Tensor | None = None) -> Affine:
        return Affine()
