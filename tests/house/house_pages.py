"""The parts of the documentation that follow from the code: made here, compared in test_house_docs.py.

python tests/house/house_pages.py        writes the generated block of docs/cli.md again
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args

import typer
from house_walk import DOCS, ROOT, SRC, tracked_files
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
CELL = re.compile(r"(?<!\\)\|")


def block(text: str, name: str) -> str:
    """What stands between `<!-- generated: name -->` and `<!-- end -->`."""
    found = [m["body"] for m in BLOCK.finditer(text) if m["name"] == name]
    assert len(found) == 1, f"{len(found)} generated blocks called {name!r}"
    return found[0].strip()


def table_rows(text: str) -> list[list[str]]:
    """The cells of every Markdown table row, without heads and rules."""
    rows: list[list[str]] = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        is_rule = re.fullmatch(r"\|[-:| ]+\|", line.strip()) is not None
        is_head = i + 1 < len(lines) and re.fullmatch(r"\|[-:| ]+\|", lines[i + 1].strip()) is not None
        if line.startswith("|") and not is_rule and not is_head:
            rows.append([cell.strip().replace("\\|", "|") for cell in CELL.split(line.strip().strip("|"))])
    return rows


# The command line ----------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Every command that does something, by its words: {"deltaw train": command, "deltaw data show": ...}."""
    from deltaw.cli.main import app

    def walk(words: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner:
            for name, sub in inner.items():
                yield from walk(f"{words} {name}", sub)
        else:
            yield words, command

    return dict(walk("deltaw", typer.main.get_command(app)))


def parameters(command: Any) -> list[Any]:
    """A command's arguments and options, without --help."""
    return [p for p in command.params if p.name != "help"]


def flags(command: Any) -> set[str]:
    """Every spelling of every option of a command."""
    found = {o for p in parameters(command) for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    return found | {"--help"}


def cli_page() -> str:
    """The reference of every command: usage, and one table row a parameter."""
    return "\n\n".join(_command(words, command) for words, command in commands().items())


def _command(words: str, command: Any) -> str:
    own = typing.get_type_hints(getattr(command.callback, "__wrapped__", command.callback))
    usage = [words]
    rows = []
    for p in parameters(command):
        names = " / ".join(f"`{o}`" for o in (*p.opts, *p.secondary_opts))
        if not any(o.startswith("-") for o in p.opts):
            label = p.metavar or p.name.upper()
            shape = f"[{label} ...]" if p.nargs == -1 else label if p.required else f"[{label}]"
            usage.append(shape)
            names = f"`{label}`"
        elif p.required:
            usage.append(f"{p.opts[0]} {p.name.upper()}")
        one_of = _choices(own.get(p.name))
        help_text = (p.help or "").strip().replace("<", "&lt;").replace("|", "\\|")
        if one_of:
            help_text = f"{help_text} One of {', '.join(f'`{c}`' for c in one_of)}."
        rows.append(f"| {names} | {help_text} | {_cli_default(p)} |")
    usage.append("[OPTIONS]")
    head = f"## `{words}`\n\n{(command.help or '').strip()}\n\n    {' '.join(usage)}\n\n"
    return head + "| | | default |\n|---|---|---|\n" + "\n".join(rows)


def _choices(hint: Any) -> list[str]:
    options = [hint, *typing.get_args(hint)]
    return [str(c) for o in options if typing.get_origin(o) is Literal for c in typing.get_args(o)]


def _cli_default(p: Any) -> str:
    if p.required:
        return "required"
    if p.default is None or p.nargs == -1:
        return "none"
    if isinstance(p.default, bool):
        return "on" if p.default else "off"
    return f"`{p.default}`"


# Recipes ---------------------------------------------------------------------------------------------


def recipe_keys() -> dict[str, str]:
    """Every key of a recipe with its default as recipes write it: {"train.lr": "0.0005", ...}."""
    from deltaw.core.spec import MethodSpec
    from deltaw.train.recipe import Recipe

    return dict(_keys("", Recipe)) | dict(_keys("adapter.", MethodSpec)) | {"adapter.method": "`lora`"}


def method_keys(method: type[BaseModel]) -> dict[str, str]:
    """The settings that a method has of its own, or with a default of its own, as recipes write them."""
    from deltaw.core.spec import MethodSpec

    shared = dict(_keys("", MethodSpec))
    return {k: v for k, v in _keys("", method) if k != "method" and shared.get(k) != v}


def _keys(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        inner = next((a for a in get_args(field.annotation) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        inner = inner or field.annotation  # a part of a recipe, or one that may be left out
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            if prefix + name != "adapter":
                yield from _keys(f"{prefix}{name}.", inner)
        else:
            yield prefix + name, _plain(field.default)


def _plain(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "none"
    if isinstance(default, bool):
        return "`true`" if default else "`false`"
    if isinstance(default, tuple):
        return f"`{list(default)}`"
    return '`" "`' if default == " " else f"`{default}`"


# The tree ---------------------------------------------------------------------------------------------


def folders() -> set[str]:
    """The folders that the README's tree names: those at the top, and the rooms of the package."""
    names = {p.relative_to(ROOT).parts[0] for p in tracked_files() if len(p.relative_to(ROOT).parts) > 1}
    rooms = {f"src/deltaw/{p.name}" for p in SRC.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    return {n for n in names if not n.startswith(".")} - {"src"} | {"src/deltaw"} | rooms


def tree_in(text: str) -> dict[str, str]:
    """Folders of an indented tree with their comments: {"src/deltaw/core": "the nouns ..."}."""
    found: dict[str, str] = {}
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        hit = re.match(r"( *)([\w./-]+)/ +(\S.*)$", line)
        if hit:
            depth = len(hit[1])
            path = [*(p for p in path if p[0] < depth), (depth, hit[2])]
            found["/".join(name for _, name in path)] = hit[3]
    return found


def main() -> None:
    """Write generated blocks again."""
    page = DOCS / "cli.md"
    text = page.read_text(encoding="utf-8")
    block(text, "cli")
    page.write_text(BLOCK.sub(lambda m: f"{m[1]}\n{cli_page()}\n\n{m[4]}", text), encoding="utf-8")
    print(f"wrote {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
