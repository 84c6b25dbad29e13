"""Rules that the code itself must keep. Each test also says how much it walked."""

from __future__ import annotations

import ast
import importlib
import inspect
import re

from house_walk import ROOT, SRC, asserting_helpers, asserts, called, functions, n_lines, shown, sources, tracked_files

import deltaw

FILE_CAP, FUNCTION_CAP = 400, 60  # lines
NOT_ASCII = {
    "src/deltaw/merge/probe.txt",  # data: a page of prose that logits are compared on
    "src/deltaw/lab/assets/vendor/d3/d3.min.js",  # as its makers published it
    "src/deltaw/lab/assets/vendor/plot/plot.umd.min.js",
}
DATA_NAMES = {"METHODS"}  # public names that are plain data; their module's docstring describes them


def test_no_file_of_the_package_is_over_the_cap():
    sizes = {shown(p): len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    over = {name: n for name, n in sizes.items() if n > FILE_CAP}
    assert len(sizes) > 40
    assert not over, f"files over {FILE_CAP} lines: {over}"


def test_no_function_of_the_package_is_over_the_cap():
    sizes = [(n_lines(f), f"{shown(p)}:{f.lineno} {f.name}") for p, tree in sources().items() for f in functions(tree)]
    over = [f"{where} ({n} lines)" for n, where in sizes if n > FUNCTION_CAP]
    assert len(sizes) > 200
    assert not over, f"functions over {FUNCTION_CAP} lines: {over}"


def test_the_package_is_plain_ascii():
    found, walked = [], 0
    for path in (p for p in tracked_files() if p.is_relative_to(SRC) and shown(p) not in NOT_ASCII):
        walked += 1
        lines = path.read_bytes().split(b"\n")
        found += [f"{shown(path)}:{number}" for number, line in enumerate(lines, start=1) if not line.isascii()]
    assert walked > 40
    assert not found, f"not ASCII (write an escape, or name the file as data): {found}"


def test_every_public_function_and_class_has_a_docstring():
    bare, walked = [], 0
    for path, tree in sources().items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                walked += 1
                bare += [] if ast.get_docstring(node) else [f"{shown(path)}:{node.lineno} {node.name}"]
    assert walked > 100
    assert not bare, f"public, without a docstring: {bare}"


def test_every_file_with_code_says_what_it_gives():
    with_code = {p: tree for p, tree in sources().items() if tree.body}
    bare = [shown(p) for p, tree in with_code.items() if not ast.get_docstring(tree)]
    assert len(with_code) > 40
    assert not bare, f"modules without a docstring: {bare}"


def test_environment_variables_are_read_in_cli_only():
    readers = re.compile(r"\bos\.(environb?|getenv|putenv)\b|\bfrom os import .*\b(environ|getenv)\b")
    rooms = [p for p in sources() if not p.is_relative_to(SRC / "cli")]
    found = [shown(p) for p in rooms if readers.search(p.read_text(encoding="utf-8"))]
    assert len(rooms) > 40
    assert not found, f"environment variables are read outside cli/: {found}"


# The public surface --------------------------------------------------------------------------------


def test_every_tensor_says_its_dtype():
    """torch's default dtype belongs to the process, and other threads change it while they load (model/quiet.py)."""
    makers = {"empty", "zeros", "ones", "full", "rand", "randn", "eye", "linspace", "tensor"}
    silent, walked = [], 0
    for path, tree in sources().items():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            made = ast.unparse(node.func).removeprefix("torch.")
            if made in makers and ast.unparse(node.func) == f"torch.{made}":
                walked += 1
                named = {keyword.arg for keyword in node.keywords}
                silent += [] if named & {"dtype", "out", None} else [f"{shown(path)}:{node.lineno} torch.{made}"]
    assert walked > 100
    assert not silent, f"made in whatever dtype is the default just then: {silent}"


def imported_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names that deltaw/__init__.py imports from the package: at once, and for type checkers only."""

    def names(body: list[ast.stmt]) -> set[str]:
        froms = (n for n in body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("deltaw"))
        return {alias.asname or alias.name for n in froms for alias in n.names} - {"*"}  # * is the methods

    guarded = [n for n in tree.body if isinstance(n, ast.If) and called(n.test) == "TYPE_CHECKING"]
    return names(tree.body), {name for n in guarded for name in names(n.body)}


def test_all_equals_the_public_names():
    now, later = imported_names(sources()[SRC / "__init__.py"])
    assert len(deltaw.__all__) == len(set(deltaw.__all__)) > 10
    assert set(deltaw.__all__) == now | later
    assert later == set(deltaw._LATER), "names for type checkers are those that load on first use"


def test_every_public_name_is_there_and_has_a_docstring():
    bare = []
    for name in [*deltaw.__all__, *(m.__name__ for m in deltaw.METHODS)]:
        value = getattr(deltaw, name)
        assert name in DATA_NAMES or callable(value), f"deltaw.{name} cannot be called: a room of that name hides it"
        if name not in DATA_NAMES and not (inspect.getdoc(value) and value.__doc__):
            bare.append(name)
    assert not bare, f"without a docstring: {bare}"
    assert all(name in (importlib.import_module("deltaw.methods").__doc__ or "") for name in DATA_NAMES)


# Tests, and every tracked file ----------------------------------------------------------------------


def test_no_test_is_without_an_assertion():
    files = [p for p in tracked_files() if p.is_relative_to(ROOT / "tests") and p.suffix == ".py"]
    trees = {p: ast.parse(p.read_text(encoding="utf-8")) for p in files}
    shared = {p.stem: asserting_helpers(t, {}) for p, t in trees.items() if not p.name.startswith("test_")}
    bare, walked = [], 0
    for path, tree in trees.items():
        helpers = asserting_helpers(tree, shared)
        for function in (f for f in functions(tree) if f.name.startswith("test_")):
            walked += 1
            bare += [] if asserts(function, helpers) else [f"{shown(path)}:{function.lineno} {function.name}"]
    assert walked > 200
    assert not bare, f"tests that cannot fail by their own words: {bare}"


def test_every_test_file_is_named_after_its_folder():
    """Files of the same name in two folders would shadow each other: there are no packages below tests/."""
    files = [p for p in tracked_files() if p.is_relative_to(ROOT / "tests") and p.name.startswith("test_")]
    stray = [shown(p) for p in files if not p.name.startswith(f"test_{p.parent.name}_")]
    assert len(files) > 15
    assert not stray, f"not called test_<folder>_*.py: {stray}"


def test_no_tracked_file_names_this_machine_or_a_registry():
    slash, dot = "/", r"\."  # in pieces, so that this file does not find itself
    folders = "|".join(("work", "root", "tmp"))
    hosts = "|".join(("pypi" + dot + "org", "python" + "hosted", "download" + dot + "pytorch", "index-" + "url"))
    wanted = re.compile(rf"(?<![\w.{slash}$}}]){slash}({folders})(?=[{slash}\"'`\s]|$)|{hosts}", re.MULTILINE)
    texts = [p for p in tracked_files() if p.suffix not in (".jsonl", ".png", ".safetensors")]
    found = [f"{shown(p)}: {m[0]}" for p in texts for m in wanted.finditer(p.read_text(encoding="utf-8"))]
    assert len(texts) > 80
    assert not found, f"paths of one machine, or registries: {found}"
