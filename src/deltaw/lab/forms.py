"""Forms of the workbench, made from the JSON schemas of recipes and methods; nothing is written for a single one."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel

from deltaw.core.spec import MethodSpec
from deltaw.methods import METHODS
from deltaw.train.recipe import Recipe

Plain = dict[str, Any]
_ENTRY = re.compile(r"(?P<names>[a-z_0-9]+(?:(?:, | or )[a-z_0-9]+)*)\s{2,}(?P<said>\S.*)")
_MARKUP = re.compile(r"`([^`]*)`")


def recipe_form() -> Plain:
    """The form of a recipe.

    sections   [{"path", "title", "about", "optional", "fields"}] in the recipe's order, without the adapter
    methods    [{"name", "rate", "trains_base", "fields", "shared"}] of every method: its own settings, and those that
               every method has; a field's path begins with "adapter."
    """
    schema = Recipe.model_json_schema()
    sections: list[Plain] = []
    for name, part in Recipe.model_fields.items():
        if name != "adapter":
            sections += _sections(name, schema["properties"][name], schema["$defs"], not part.is_required())
    return {"sections": sections, "methods": [_method(m) for m in METHODS]}


def described(model: type[BaseModel]) -> dict[str, str]:
    """What the docstrings of a model and its bases say of each of its fields: entries of "name   what it is"."""
    found: dict[str, str] = {}
    for kind in model.__mro__:
        if not (issubclass(kind, BaseModel) and kind.__doc__) or kind is BaseModel:
            continue
        said: dict[str, str] = {}
        names: list[str] = []
        margin = 0
        for line in kind.__doc__.splitlines()[1:]:
            text, indent = line.strip(), len(line) - len(line.lstrip())
            entry = _ENTRY.fullmatch(text)
            if entry and all(n in model.model_fields for n in re.split(", | or ", entry["names"])):
                names, margin = re.split(", | or ", entry["names"]), indent
                said |= dict.fromkeys(names, entry["said"])
            elif text and names and indent > margin:
                said |= {n: f"{said[n]} {text}" for n in names}
            else:
                names = []
        found = {**said, **found}
    return {name: _MARKUP.sub(r"\1", text) for name, text in found.items()}


def _method(model: type[MethodSpec]) -> Plain:
    schema = model.model_json_schema()
    fields = [
        _field(f"adapter.{name}", part, described(model).get(name, ""), False)
        for name, part in schema["properties"].items()
        if name != "method"
    ]
    own = [f for f in fields if f["name"] not in MethodSpec.model_fields]
    shared = [f for f in fields if f["name"] in MethodSpec.model_fields]
    return {"name": model.name, "rate": model.lr, "trains_base": model.trains_base, "fields": own, "shared": shared}


def _sections(path: str, part: Plain, defs: Plain, optional: bool) -> list[Plain]:
    """A part of the recipe as a section, and the parts inside it as sections behind it."""
    model = _model(part, defs)
    fields: list[Plain] = []
    inner: list[Plain] = []
    needed = model.get("required", [])
    about = described(_class(path))
    for name, one in model["properties"].items():
        if _model(one, defs):
            inner += _sections(f"{path}.{name}", one, defs, True)
        else:
            fields.append(_field(f"{path}.{name}", one, about.get(name, ""), name in needed))
    title = path.replace("train.optimizer", "optimizer").capitalize()
    first = model["description"].partition("\n")[0]
    return [{"path": path, "title": title, "about": first, "optional": optional, "fields": fields}, *inner]


def _class(path: str) -> type[BaseModel]:
    """The model of a part of the recipe, by its dotted name."""
    model: Any = Recipe
    for name in path.split("."):
        kinds = [model.model_fields[name].annotation, *getattr(model.model_fields[name].annotation, "__args__", ())]
        model = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    found: type[BaseModel] = model
    return found


def _model(part: Plain, defs: Plain) -> Plain:
    """The definition that a part refers to; {}: it is a plain value."""
    for one in [part, *part.get("anyOf", []), *part.get("allOf", [])]:
        if "$ref" in one:
            found: Plain = defs[one["$ref"].rpartition("/")[2]]
            return found if found.get("type") == "object" else {}
    return {}


def _field(path: str, part: Plain, about: str, required: bool) -> Plain:
    """One value as an input: kind is choice, switch, whole, number, text, names (a text or a list), list or map."""
    kinds = [part, *part.get("anyOf", [])]
    types = {k["type"] for k in kinds if "type" in k}
    options = next((k["enum"] for k in kinds if "enum" in k), None)
    name = path.rpartition(".")[2]
    made: Plain = {"path": path, "name": name, "about": about, "default": part.get("default"), "required": required}
    made["nullable"] = "null" in types
    if options is not None:
        made |= {"kind": "choice", "options": [None, *options] if made["nullable"] else options}
    elif "boolean" in types:
        made["kind"] = "switch"
    elif "integer" in types and "string" not in types:
        made["kind"] = "whole"
    elif "number" in types:
        made["kind"] = "number"
    elif "array" in types:
        made["kind"] = "names" if "string" in types else "list"
    else:
        made["kind"] = "map" if "object" in types else "text"
    for key, limit in (("minimum", "min"), ("maximum", "max"), ("exclusiveMaximum", "below"), ("pattern", "pattern")):
        if (value := next((k[key] for k in kinds if key in k), None)) is not None:
            made[limit] = value
    return made


def blamed(sentence: str, paths: list[str]) -> list[str]:
    """Which of the fields `paths` a sentence of the library is about: "train.lr must ..." is about train.lr.

    A field is meant where its whole path stands there, or its name behind its section's or its method's.
    """
    named = set(re.findall(r"[A-Za-z0-9_]+(?:\.[A-Za-z0-9_]+)*", sentence))
    found = [path for path in paths if path in named]
    if found:
        return found
    heads = {word.partition(".")[0] for word in named}
    ends = {word.rpartition(".")[2] for word in named if "." in word} | {w for w in named if "_" in w}
    near = [p for p in paths if p.rpartition(".")[2] in ends | named]
    of_section = [p for p in near if p.partition(".")[0] in heads]
    return of_section or [p for p in near if p.rpartition(".")[2] in ends]
