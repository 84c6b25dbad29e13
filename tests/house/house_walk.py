"""What the house tests walk: tracked files, Python sources and their syntax trees."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "deltaw"
DOCS = ROOT / "docs"

Function = ast.FunctionDef | ast.AsyncFunctionDef


def shown(path: Path) -> str:
    """A path as people write it: from the root of the checkout, with forward slashes."""
    return path.relative_to(ROOT).as_posix()


@cache
def tracked_files() -> tuple[Path, ...]:
    """Every file that git tracks, or would if it were added now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(sorted(p for name in set(done.stdout.split("\0")) if name and (p := ROOT / name).is_file()))


@cache
def sources() -> dict[Path, ast.Module]:
    """Every Python file of the package with its syntax tree."""
    return {p: ast.parse(p.read_text(encoding="utf-8")) for p in sorted(SRC.rglob("*.py"))}


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def n_lines(function: Function) -> int:
    """Lines from `def` to the end of the body; decorators do not count."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def called(node: ast.AST) -> str:
    """The dotted name that a call or an expression reads, "" for anything else."""
    if isinstance(node, ast.Call):
        return called(node.func)
    if isinstance(node, ast.Attribute):
        return f"{called(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def asserts(function: ast.AST, helpers: Collection[str] = ()) -> bool:
    """Whether a test can fail by its own words: assert, pytest.raises or warns or fail, an assert_ call, or a
    call of one of `helpers`."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = called(node)
            last = name.rpartition(".")[2]
            if name in ("pytest.raises", "pytest.warns", "pytest.fail") or last.startswith("assert_"):
                return True
            if name in helpers:
                return True
    return False


def asserting_helpers(tree: ast.Module, elsewhere: Mapping[str, Collection[str]]) -> set[str]:
    """Functions that are not tests, can fail by their own words, and are defined in this file or imported from
    one of the test suite's own modules (`elsewhere`: module -> its asserting helpers)."""
    found = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in elsewhere
        for alias in node.names
        if alias.name in elsewhere[node.module]
    }
    own = [f for f in functions(tree) if not f.name.startswith("test_")]
    while more := {f.name for f in own if f.name not in found and asserts(f, found)}:
        found |= more
    return found
