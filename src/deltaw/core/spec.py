"""What a method is: its settings, and how they become parameters and a normal form.

A method is one file with one class: the class is its settings (pydantic, frozen, unknown keys refused) and
carries `shapes`, `init` and `lower`. The registry in methods/__init__.py has one line for it. Everything
else (training, merging, saving, loading, planning, the command line) is written once against this class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.core.prefix import Prefix
from deltaw.core.site import LinearSite, Site
from deltaw.core.weight import Weight
from deltaw.errors import SpecError, near

Form = Affine | Bottleneck | Prefix
Params = dict[str, Tensor]

MOST = 2**24
"""The largest rank, width or number of tokens in front that settings may ask for."""


def _at_least_one(value: int) -> int:
    if value < 1:
        raise ValueError("must be at least 1")
    if value > MOST:  # no matrix is as wide, and its bytes would not fit 64 bits
        raise ValueError(f"must be at most {MOST:,}")
    return value


def _within_64_bits(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("must fit 64 bits")
    return value


def _below_one(value: float) -> float:
    if not 0 <= value < 1:
        raise ValueError("must be at least 0 and below 1")
    return value


def finite_not_zero(value: float) -> float:
    """`value`, where float32 holds it. Raises ValueError."""
    if not abs(value) <= torch.finfo(torch.float32).max or value == 0:
        raise ValueError("must be a finite number other than 0")
    return value


Count = Annotated[int, AfterValidator(_at_least_one), Field(json_schema_extra={"minimum": 1})]
Seed = Annotated[int, AfterValidator(_within_64_bits)]
Share = Annotated[float, AfterValidator(_below_one), Field(json_schema_extra={"minimum": 0, "exclusiveMaximum": 1})]
Factor = Annotated[float, AfterValidator(finite_not_zero)]


@dataclass(frozen=True)
class Start:
    """What fresh parameters at one site are made from.

    rng         all randomness
    weight      the frozen matrix of a linear map, or of the token embeddings at a virtual site; None at a block's half
    bias        the base's bias there, or None
    source      W [out, in] as the checkpoint has it, before it was quantised; None where that is not known
    directions  [k, in] leading right singular vectors of the inputs at the site, for a method that `calibrates`
    encode      text to token ids, where the base has a tokenizer
    """

    rng: torch.Generator
    weight: Weight | None = None
    bias: Tensor | None = None
    source: Callable[[], Tensor] | None = None
    directions: Tensor | None = None
    encode: Callable[[str], Sequence[int]] | None = None


@dataclass(frozen=True)
class Groups:
    """How a document is cut for sparse attention: groups of `size` tokens, for half of the heads moved by `shift`."""

    size: int
    shift: int


@dataclass(frozen=True)
class Made:
    """A method's settings and parameters: `sites` by site name, `shared` of the whole model."""

    spec: MethodSpec
    sites: dict[str, Params]
    shared: Params


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

    if TYPE_CHECKING:
        method: str = ""  # its own name, which `__init__` fills in
    else:
        method: str
    targets: str | tuple[str, ...] = "all-linear"
    exclude: str | tuple[str, ...] | None = None
    layers: str | tuple[int, ...] | None = None
    save_modules: tuple[str, ...] = ()
    new_tokens: tuple[str, ...] = ()

    name: ClassVar[str]  # the key in recipes and files
    sits: ClassVar[Literal["linear", "block", "input", "cache"]] = "linear"  # on which kind of place
    lr: ClassVar[float] = 5e-4  # the learning rate of a recipe that does not say
    schedule: ClassVar[Literal["cosine", "hold"]] = "cosine"  # of the learning rate, likewise
    starts_at_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = True
    batchable: ClassVar[bool] = True
    trains_base: ClassVar[bool] = False  # the base's own weights train (full fine-tuning)
    formats: ClassVar[tuple[str, ...] | None] = None  # of the base's linear maps; None: all
    fixed: ClassVar[tuple[str, ...]] = ()  # parameters, own or shared, that never train
    detaches: ClassVar[bool] = False  # `lower` takes a part of its parameters as constant: see its gradients
    peft_type: ClassVar[str | None] = None  # in adapter_config.json; None: no adapter is saved
    peft_prefix: ClassVar[str] = "base_model.model."  # before a module's path in PEFT's tensor names
    in_peft: ClassVar[bool] = True  # HF PEFT has the method and reads its files

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
            if dash and int(first) > int(last):
                raise ValueError(f"is {value!r}, which ends before it begins; write '{last}-{first}'")
        return value

    @model_validator(mode="after")
    def _places_are_its_own(self) -> MethodSpec:
        kind = type(self).sits
        if kind != "linear" and self.targets != "all-linear":
            raise ValueError(f"method {self.name!r} does not sit at linear maps: remove targets")
        if kind in ("input", "cache") and (self.exclude is not None or self.layers is not None):
            raise ValueError(f"method {self.name!r} sits in front of the sequence: remove exclude and layers")
        return self

    def layer_numbers(self) -> set[int] | None:
        """The block numbers asked for, or None for all."""
        if self.layers is None:
            return None
        if isinstance(self.layers, str):
            first, _, last = self.layers.partition("-")
            return set(range(int(first), int(last or first) + 1))
        return set(self.layers)

    # What a method defines. `site` is of the kind that `sits` names -----------------------------------

    def shapes(self, site: Any, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        """The parameters at `site`, by name; none: a linear map is then left out, although it is targeted.

        `targeted` is False at a site that only `wants` keeps.
        """
        raise NotImplementedError

    def init(self, site: Any, start: Start) -> Params:
        """Fresh float32 parameters for `site`; all randomness comes from `start.rng`."""
        raise NotImplementedError

    def lower(self, site: Any, params: Params, weight: Weight, bias: Tensor | None = None) -> Form:
        """The parameters as a normal form, differentiable in them.

        params  those at the site and the shared ones;  weight, bias  of the base there, at a linear map
        """
        raise NotImplementedError

    # What a method may define ---------------------------------------------------------------------

    def choose(self, sites: list[LinearSite]) -> list[LinearSite] | None:
        """The linear maps that `targets` means by a word of this method's own; None: it is no such word."""
        return None

    def idle(self, sites: list[Any]) -> list[str]:
        """Settings for single places that none of the targeted `sites` uses: a misspelt name, most likely."""
        return []

    def wants(self, site: Site) -> bool:
        """Whether a site that no target names gets parameters all the same (bias = "all")."""
        return False

    def sits_at(self, site: Site) -> bool:
        """Whether a block's half, or the front of the sequence, gets parameters. Linear maps go by `targets`."""
        return True

    def shared_shapes(self, sites: Sequence[Any]) -> dict[str, tuple[int, ...]]:
        """Parameters of the whole adapter, which every one of its `sites` reads."""
        return {}

    def init_shared(self, sites: Sequence[Any], rng: torch.Generator) -> Params:
        """Fresh shared parameters."""
        return {}

    @property
    def trains_biases(self) -> bool:
        """Whether biases of linear maps can train."""
        return False

    @property
    def trains_norm_biases(self) -> bool:
        """Whether biases that belong to no linear map, those of norms, train and are saved whole."""
        return False

    @property
    def shared_is_saved(self) -> bool:
        """Whether shared parameters are in the file; if not, `init_shared` makes them again from the settings."""
        return True

    @property
    def rate(self) -> float:
        """The learning rate of a recipe that does not say: `lr`, where no setting of the method wants another."""
        return self.lr

    @property
    def calibrates(self) -> int:
        """How many directions of its inputs each site needs to start from; 0: none."""
        return 0

    def settled(self, made: Made, sites: Mapping[str, Any]) -> Made:
        """What is saved: the same change without what only training needs (a prompt's encoder, a frozen start)."""
        return made

    def lower_in_step(self, site: Any, params: Params, rng: torch.Generator) -> Form | None:
        """In front of the sequence: what `lower` gives in a training step, for dropout from `rng`; None: the same."""
        return None

    def overrides(self, config: Any) -> dict[str, Any]:
        """Settings of the base's config that hold while the adapter is in use, and in a merged model."""
        return {}

    def groups(self, length: int) -> Groups | None:
        """How attention is cut in training, in a document of `length` tokens; None: it is not."""
        return None

    # How PEFT names the same thing ----------------------------------------------------------------

    def to_peft(self, sites: list[Any]) -> dict[str, Any]:
        """The method's part of PEFT's adapter_config.json, for the sites it sits on."""
        raise NotImplementedError

    @classmethod
    def reads_peft(cls, config: dict[str, Any]) -> bool:
        """Whether an adapter_config.json is this method's."""
        return cls.peft_type is not None and config.get("peft_type") == cls.peft_type

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> MethodSpec:
        """Settings from PEFT's adapter_config.json; raises AdapterError for what we cannot represent."""
        raise NotImplementedError

    @classmethod
    def peft_params(cls) -> dict[str, tuple[str, str]]:
        """PEFT's tensor names -> (our parameter, where).

        where  "linear", "embedding", "block", or "any" of these: the name follows a module's path; "shared",
               "virtual": it is whole
        """
        raise NotImplementedError

    @classmethod
    def peft_site(cls, name: str, params: Params) -> Site | None:
        """The site of a foreign adapter's tensors, as far as they tell; None: as LoRA's."""
        return None


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """pydantic's complaints as sentences with the near name of an unknown key."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown setting {key!r} for {model.__name__}.{near(key, model.model_fields)}".rstrip("."))
        else:
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{model.__name__}.{key}: {message} (got {item.get('input')!r})")
    return "; ".join(lines)
