"""A run as data: base, adapter, data, training, evaluation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deltaw.core.spec import MethodSpec
from deltaw.data.spec import DataSpec
from deltaw.errors import RecipeError, near
from deltaw.formats import BLOCKS, FORMATS
from deltaw.methods import spec_from
from deltaw.train.optim.settings import RATES, OptimizerSpec

_STRICT = ConfigDict(frozen=True, extra="forbid")


class BaseSpec(BaseModel):
    """The base: where it is, how its weights are kept, and the dtype it computes in.

    path                 a folder, a hub id or a starter's name
    format               of its linear maps: dense (as the folder has them), or nf4, fp4, int4, int8 (quantised on load)
    block, double_quant  of a quantised format: values that share a scale; scales in 8 bits too
    dtype                in which it computes; auto: what is fastest here without losing what is learned
    device               cpu, cuda, or cuda:N: where the run computes
    """

    model_config = _STRICT

    path: str
    format: str = Field(default="dense", json_schema_extra={"enum": list(FORMATS)})
    block: int = Field(default=64, json_schema_extra={"enum": list(BLOCKS)})
    double_quant: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$")

    @model_validator(mode="after")
    def _format_exists(self) -> BaseSpec:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}.{near(self.format, FORMATS)} Known: {', '.join(FORMATS)}")
        if self.format == "dense" and (self.double_quant or self.block != 64):
            raise ValueError("block and double_quant belong to a quantised format; add format: nf4, or remove them")
        if self.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, not {self.block}")
        return self


class TrainSpec(BaseModel):
    """How long, how fast, and in what portions.

    epochs or steps   length of the run (steps wins); an epoch is every row once
    tokens_per_step   tokens of one optimizer step; documents are packed up to it, none is split
    micro_tokens      tokens computed at a time (bounds memory, does not change the result); None: all at once
    lr                highest learning rate; None: what suits the method (docs/methods)
    schedule          of the learning rate after warm-up: cosine or linear to `final_lr_ratio`, hold (linear, after 60 %
                      of the steps), or constant; None: what suits the method
    warmup_ratio      share of the steps in which the learning rate rises from 0
    final_lr_ratio    last learning rate over `lr`
    clip              largest norm of the whole gradient; 0 switches it off
    seed              of fresh parameters, the order of rows and dropout
    loss              sft: negative log-likelihood of the target tokens
    optimizer         its settings, or its name alone
    checkpointing     recompute activations in the backward instead of keeping them
    save_every_s      seconds between checkpoints (0: after each step)
    threads           of the processor; None: as many as PyTorch takes
    tensorboard       write scalars for TensorBoard too
    """

    model_config = _STRICT

    epochs: float = 1
    steps: int | None = None
    tokens_per_step: int = 2048
    micro_tokens: int | None = None
    lr: float | None = None
    schedule: Literal["cosine", "linear", "hold", "constant"] | None = None
    warmup_ratio: float = 0.03
    final_lr_ratio: float = 0.0
    clip: float = 1.0
    seed: int = 0
    loss: str = "sft"
    optimizer: OptimizerSpec = OptimizerSpec()
    checkpointing: bool = False
    save_every_s: float = 60.0
    threads: int | None = None
    tensorboard: bool = False

    @field_validator("optimizer", mode="before")
    @classmethod
    def _name_alone_is_enough(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _numbers_make_sense(self) -> TrainSpec:
        positive = {
            "epochs": self.epochs,
            "steps": self.steps,
            "tokens_per_step": self.tokens_per_step,
            "micro_tokens": self.micro_tokens,
            "lr": self.lr,
            "threads": self.threads,
            "optimizer.lora_plus_ratio": self.optimizer.lora_plus_ratio,
            "optimizer.eps": self.optimizer.eps,
        }
        for key, value in positive.items():
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{key} must be a finite number above 0, not {value}")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit 64 bits, not {self.seed}")
        if self.threads is not None and self.threads > 1024:
            raise ValueError(f"threads must be at most 1024, not {self.threads}")
        o = self.optimizer
        not_negative = {
            "clip": self.clip,
            "save_every_s": self.save_every_s,
            "optimizer.weight_decay": o.weight_decay,
        }
        for key, value in not_negative.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{key} must be 0 or above, not {value}")
        if not all(0 <= beta < 1 for beta in o.betas):
            raise ValueError(f"optimizer.betas must be at least 0 and below 1, not {list(o.betas)}")
        for key in ("warmup_ratio", "final_lr_ratio"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key} must be between 0 and 1, not {getattr(self, key)}")
        return self


class EvalSpec(BaseModel):
    """Evaluation on the validation rows while training.

    every_steps   optimizer steps between evaluations; None: at the end of each epoch
    metric        what "best" means: "loss", or a task metric
    keep          which adapter the run leaves: the best seen, or the last
    patience      evaluations without a better value before the run stops early; None: never
    limit         validation rows used for a task metric; None: all
    labels        file with the list of labels for metric "choice"; None: each row brings its "choices"
    max_new_tokens  longest answer that a task metric generates; None: the longest completion and a little more
    """

    model_config = _STRICT

    every_steps: int | None = None
    metric: Literal["loss", "exact", "json", "choice", "perplexity"] = "loss"
    keep: Literal["best", "last"] = "best"
    patience: int | None = None
    limit: int | None = None
    labels: str | None = None
    max_new_tokens: int | None = None

    @model_validator(mode="after")
    def _counts_are_positive(self) -> EvalSpec:
        for key in ("every_steps", "patience", "limit", "max_new_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, not {value}")
        return self


class BudgetSpec(BaseModel):
    """What a run may take.

    memory_gb   of resident memory in the whole process (10^9 bytes)
    """

    model_config = _STRICT

    memory_gb: float

    @field_validator("memory_gb")
    @classmethod
    def _is_positive(cls, value: float) -> float:
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"must be a finite number above 0, not {value}")
        return value


class Recipe(BaseModel):
    """A whole run. `adapter` holds a method's settings: {method: lora, rank: 16, ...}."""

    model_config = _STRICT

    base: BaseSpec
    adapter: MethodSpec
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    eval: EvalSpec = EvalSpec()
    budget: BudgetSpec | None = None

    @field_validator("base", mode="before")
    @classmethod
    def _path_alone_is_enough(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("adapter", mode="before")
    @classmethod
    def _settings_become_a_spec(cls, value: Any) -> Any:
        return spec_from(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _learning_rate_suits_the_method(self) -> Recipe:
        suits = {"lr": RATES.get(self.train.optimizer.name, self.adapter.rate), "schedule": self.adapter.schedule}
        if left := {key: value for key, value in suits.items() if getattr(self.train, key) is None}:
            object.__setattr__(self, "train", self.train.model_copy(update=left))
        return self

    @model_validator(mode="after")
    def _budget_is_of_the_cpu(self) -> Recipe:
        if self.budget is not None and self.base.device != "cpu":
            raise ValueError("budget plans the memory of a run on the CPU; remove budget, or base.device")
        return self

    @model_validator(mode="after")
    def _optimizer_suits_the_method(self) -> Recipe:
        o, method = self.train.optimizer, type(self.adapter)
        if o.name == "galore" and not method.trains_base:
            raise ValueError(
                f"train.optimizer is galore, and adapter.method is {method.name!r}: GaLore projects gradients of the "
                "base's own weights. Use method: full, or name: adamw (a method's own parameters are few)"
            )
        if o.lora_plus_ratio != 1 and method.trains_base:
            raise ValueError(
                f"train.optimizer.lora_plus_ratio is {o.lora_plus_ratio:g}, and method {method.name!r} trains the "
                "base's own weights, which have no A and B; use name: adamw"
            )
        return self

    def plain(self) -> dict[str, Any]:
        """The recipe as plain data; `load_recipe` reads it back to an equal recipe."""
        return {**self.model_dump(mode="json"), "adapter": self.adapter.model_dump(mode="json")}


def load_recipe(source: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file (or plain data), with overrides like "train.lr=1e-3".

    Paths of data are taken from the recipe's folder when they exist there, else from the working folder.

    Raises RecipeError for unknown keys (with the near name), bad values, a file that is missing or no YAML.
    """
    if isinstance(source, Recipe):
        return source if not overrides else load_recipe(source.plain(), overrides)
    folder = None
    if isinstance(source, dict):
        plain, name = json.loads(json.dumps(source, default=_as_plain)), "recipe"
    else:
        plain, folder, name = _read(Path(source)), Path(source).parent, str(source)
    for override in overrides:
        _override(plain, override)
    try:
        json.dumps(plain, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(f"{name}: a text holds half a character (a lone surrogate): take it out.") from None
    try:
        recipe = Recipe(**plain)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error)}") from None
    except TypeError as error:
        raise RecipeError(f"{name}: keys must be words: {error}") from None
    return recipe if folder is None else _with_paths(recipe, folder)


def _as_plain(value: Any) -> Any:
    """A method's settings, a part of a recipe or a path inside plain data, as plain data."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"No recipe at {path}.")
    try:
        plain = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict):
        raise RecipeError(f"{path} holds {'nothing' if plain is None else type(plain).__name__}, not a recipe.")
    return plain


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-4 as text; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


_SHORT = {"base": "path", "optimizer": "name"}  # sections that a word alone stands for


def _override(plain: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{override!r} is no override; write key=value, as in train.lr=1e-3.")
    *path, last = key.split(".")
    place = plain
    for part in path:
        inner = place.get(part)
        if inner is None:
            inner = place[part] = {}
        elif isinstance(inner, str) and part in _SHORT:
            inner = place[part] = {_SHORT[part]: inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"{override!r}: {part!r} holds {inner!r}, not settings.")
        place = inner
    try:
        place[last] = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML: {' '.join(str(error).split())}") from None


_SECTIONS: dict[str, type[BaseModel]] = {
    "": Recipe,
    "base": BaseSpec,
    "data": DataSpec,
    "train": TrainSpec,
    "train.optimizer": OptimizerSpec,
    "eval": EvalSpec,
    "budget": BudgetSpec,
}


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        *path, key = [str(part) for part in item["loc"]] or [""]
        where = ".".join([*path, key])
        if item["type"] == "extra_forbidden":
            section = _SECTIONS.get(".".join(path), Recipe)
            known = section.model_fields
            lines.append(f"unknown key {where!r}.{near(key, known)} Known there: {', '.join(known)}.")
        elif item["type"] == "missing":
            lines.append(f"{where!r} is missing.")
        else:
            given = item.get("input")
            found = "" if isinstance(given, dict) else f" (got {given!r})"
            said = item["msg"].removeprefix("Value error, ").rstrip(".")
            lines.append(f"{where}{': ' if where else ''}{said}{found}.")
    return " ".join(lines)


def _with_paths(recipe: Recipe, folder: Path) -> Recipe:
    def found(path: str | None) -> str | None:
        beside = folder / path if path and ":" not in path[:3] else None
        return str(beside) if beside is not None and beside.exists() else path

    labels = recipe.data.labels
    labels = found(labels) if isinstance(labels, str) else labels
    files = {"train": found(recipe.data.train), "valid": found(recipe.data.valid), "labels": labels}
    data = recipe.data.model_copy(update=files)
    evaluation = recipe.eval.model_copy(update={"labels": found(recipe.eval.labels)})
    base_path = folder / recipe.base.path
    base = recipe.base.model_copy(update={"path": str(base_path)}) if base_path.exists() else recipe.base
    return recipe.model_copy(update={"data": data, "eval": evaluation, "base": base})
