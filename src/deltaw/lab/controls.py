"""Controls of a picture: a pydantic model checks them, and the page draws them from the same fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from deltaw.core.spec import describe
from deltaw.errors import BadInput

Control = tuple[Any, Any]
"""(type, default with its field): what pydantic.create_model takes."""


class Controls(BaseModel):
    """What every picture's controls share: an unknown name is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def slider(default: int, low: int, high: int, label: str, recorded: Sequence[int] = ()) -> Control:
    """A whole number from `low` to `high`; `recorded`: the positions that an exported site has."""
    return Annotated[int, Field(ge=low, le=high, title=label, json_schema_extra=_extra("slider", recorded))], default


def fraction(
    default: float, low: float, high: float, step: float, label: str, recorded: Sequence[float] = ()
) -> Control:
    """A number from `low` to `high`; the page moves it by `step`."""
    extra = _extra("slider", recorded) | {"step": step}
    field = Field(ge=low, le=high, allow_inf_nan=False, title=label, json_schema_extra=extra)
    return Annotated[float, field], default


def choice(
    default: str, options: Sequence[str], label: str, recorded: Sequence[str] = (), *, ordered: bool = False
) -> Control:
    """One of `options`; those that are `ordered` (sizes) are drawn as a slider."""
    kind = "steps" if ordered else "choice"
    extra = _extra(kind, recorded) | {"options": list(options)}
    return Annotated[Literal[tuple(options)], Field(title=label, json_schema_extra=extra)], default


def switch(default: bool, label: str, recorded: Sequence[bool] = ()) -> Control:
    """On or off."""
    return Annotated[bool, Field(title=label, json_schema_extra=_extra("switch", recorded))], default


def text(default: str, longest: int, label: str) -> Control:
    """A line of text of 1 to `longest` characters."""
    field = Field(min_length=1, max_length=longest, title=label, json_schema_extra=_extra("text", ()))
    return Annotated[str, field], default


def _extra(kind: str, recorded: Sequence[Any]) -> dict[str, Any]:
    return {"kind": kind, "recorded": list(recorded)}


def controls(name: str, **fields: Control) -> type[Controls]:
    """A picture's controls as a model called `name`, for messages."""
    return create_model(name, __base__=Controls, **fields)  # type: ignore[call-overload,no-any-return]


def read(model: type[Controls], given: Mapping[str, Any]) -> Controls:
    """`given` as controls. Raises BadInput with one sentence for an unknown name or a value out of range."""
    try:
        return model(**given)
    except ValidationError as problem:
        raise BadInput(describe(problem, model)) from None


def drawn(model: type[Controls]) -> list[dict[str, Any]]:
    """The controls as the page draws them: name, label, kind, default, ranges or options, recorded positions."""
    found = []
    for name, part in model.model_json_schema()["properties"].items():
        recorded = part["recorded"] or [part["default"]]
        one = {"name": name, "label": part["title"], "kind": part["kind"], "default": part["default"]}
        one["recorded"] = recorded
        if part["kind"] == "slider":
            one |= {"min": part["minimum"], "max": part["maximum"], "step": part.get("step", 1)}
        if "options" in part:
            one["options"] = part["options"]
        if part["kind"] == "text":
            one["longest"] = part["maxLength"]
        found.append(one)
    return found
