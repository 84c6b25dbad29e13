"""What a method is: its settings, and how they become parameters and a normal form.

A method is one file with one class: the class is its settings (pydantic, frozen, unknown keys refused) and
carries `shapes`, `init` and `lower`. The registry in methods/__init__.py has one line for it. Everything
else (training, merging, saving, loading, the command line) is written once against this class.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.site import LinearSite
from deltaw.core.weight import Weight
from deltaw.errors import SpecError, near

Params = dict[str, Tensor]


class MethodSpec(BaseModel):
    """Settings that every method shares: where it sits, and which whole modules it trains beside.

    targets       "all-linear" (every linear map but the head), a list of names or suffixes
                  ("q_proj", "layers.3.mlp.up_proj"), or a regular expression for the whole path
    exclude       names, suffixes, or a regular expression to leave out
    layers        block numbers to keep, as a list or as a range "0-11"
    save_modules  whole modules that train and are saved beside the method ("lm_head", "norm")
    new_tokens    new vocabulary, whose rows alone train and are saved
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    method: str
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] | None = None
    layers: str | tuple[int, ...] | None = None
    save_modules: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()

    name: ClassVar[str]  # the key in recipes and files
    starts_at_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False  # the base's own weights train (full fine-tuning)
    peft_type: ClassVar[str | None] = None

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("method", type(self).name)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SpecError(describe(error, type(self))) from None

    @field_validator("method")
    @classmethod
    def _method_is_its_own(cls, value: str) -> str:
        if value != cls.name:
            raise ValueError(f"is {value!r}, but these settings belong to method {cls.name!r}")
        return value

    @field_validator("layers")
    @classmethod
    def _layers_are_numbers(cls, value: str | tuple[int, ...] | None) -> str | tuple[int, ...] | None:
        if isinstance(value, str):
            first, dash, last = value.partition("-")
            if not (first.isdigit() and (last.isdigit() if dash else True)):
                raise ValueError(f"is {value!r}; write a list [0, 1] or a range '0-11'")
        return value

    def layer_numbers(self) -> set[int] | None:
        """The block numbers asked for, or None for all."""
        if self.layers is None:
            return None
        if isinstance(self.layers, str):
            first, _, last = self.layers.partition("-")
            return set(range(int(first), int(last or first) + 1))
        return set(self.layers)

    # What a method defines ---------------------------------------------------------------------

    def shapes(self, site: LinearSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        """The parameters at `site`, by name. `targeted` is False at a site that only `wants` keeps."""
        raise NotImplementedError

    def idle(self, sites: list[LinearSite]) -> list[str]:
        """Settings for single places that none of the targeted `sites` uses: a misspelt name, most likely."""
        return []

    def wants(self, site: LinearSite) -> bool:
        """Whether a site that no target names gets parameters all the same (bias = "all")."""
        return False

    def init(self, site: LinearSite, weight: Weight, bias: Tensor | None, rng: torch.Generator) -> Params:
        """Fresh float32 parameters for `site`; all randomness comes from `rng`."""
        raise NotImplementedError

    def lower(self, site: LinearSite, params: Params, weight: Weight) -> Affine:
        """The parameters as a normal form, differentiable in them."""
        raise NotImplementedError

    # How PEFT names the same thing ----------------------------------------------------------------

    def to_peft(self, sites: list[LinearSite]) -> dict[str, Any]:
        """The method's part of PEFT's adapter_config.json, for the sites it sits on."""
        raise NotImplementedError

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> MethodSpec:
        """Settings from PEFT's adapter_config.json; raises AdapterError for what we cannot represent."""
        raise NotImplementedError

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        """PEFT's tensor names below a module path -> (our parameter, "linear" or "embedding")."""
        raise NotImplementedError


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """pydantic's complaints as sentences with the near name of an unknown key."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {key!r} for {model.__name__}.{near(key, model.model_fields)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{model.__name__}.{key}: {message} (got {item.get('input')!r})")
    return "; ".join(lines)
