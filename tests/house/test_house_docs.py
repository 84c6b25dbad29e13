"""README and documentation say what the code does."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import house_pages as pages
import pytest
import yaml
from house_walk import DOCS, ROOT, SRC, called, shown, sources, tracked_files

import deltaw
from deltaw import errors
from deltaw.methods import METHODS

README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [p for p in tracked_files() if p.suffix == ".md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of its rank."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no section {title!r}"
    return found[1]


def code_blocks(text: str, language: str) -> list[str]:
    return [body for kind, body in FENCE.findall(text) if kind == language]


# Reference pages -----------------------------------------------------------------------------------


def test_the_command_reference_is_what_the_program_says():
    page = pages.block((DOCS / "cli.md").read_text(encoding="utf-8"), "cli")
    assert len(pages.commands()) >= 7
    assert page == pages.cli_page(), "run: python tests/house/house_pages.py"


def test_every_command_and_flag_has_help():
    bare = [words for words, command in pages.commands().items() if not command.help]
    every = [(words, p) for words, command in pages.commands().items() for p in pages.parameters(command)]
    bare += [f"{words} {p.opts[0]}" for words, p in every if not p.help]
    assert len(every) > 40
    assert not bare, f"without help: {bare}"


def test_the_recipe_reference_has_every_key_with_its_default():
    rows = pages.table_rows((DOCS / "recipes.md").read_text(encoding="utf-8"))
    documented = {key.strip("`"): default for key, default, _ in rows}
    assert len(rows) == len(documented) > 40, "a key is there twice"
    assert documented == pages.recipe_keys()
    assert not [key for key, _, meaning in rows if len(meaning) < 10]


def test_every_exception_is_in_the_error_reference():
    rows = pages.table_rows((DOCS / "errors.md").read_text(encoding="utf-8"))
    documented = {cells[0].strip("`"): cells[1:3] for cells in rows if len(cells) == 4}
    found = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.DeltawError)}
    assert len(found) > 10
    assert set(documented) == set(found)
    for name, (also, code) in documented.items():
        assert also.strip("`") in {c.__name__ for c in found[name].__bases__}, name
        assert int(code) == found[name].exit_code, name
        assert name in (errors.__doc__ or ""), f"{name} is missing from the tree in errors.py"


def test_every_method_has_a_page_and_a_row():
    rows = {cells[0].strip("`"): cells[1:] for cells in pages.table_rows(section(README, "Methods"))}
    assert len(METHODS) > 0
    assert list(rows) == [m.name for m in METHODS]
    for method in METHODS:
        page = DOCS / "methods" / f"{method.name}.md"
        assert page.is_file(), f"{shown(page)} is missing"
        formula, mergeable, peft_type = rows[method.name]
        assert len(formula) > 10
        assert mergeable == ("yes" if method.mergeable else "no"), method.name
        assert peft_type.strip("`") == (method.peft_type or "none"), method.name
        text = page.read_text(encoding="utf-8")
        home = f"::: {method.__module__}.{method.__name__}"
        for fact in (f"`{method.name}`", f"`mergeable`: {mergeable}", f"PEFT type: {peft_type}", home):
            assert fact in text, f"{shown(page)} does not say {fact}"
        assert f"learning rate: `{method.lr:g}`" in text, f"{shown(page)} does not say `{method.lr:g}`"
        settings = {key.strip("`"): default for key, default, _ in pages.table_rows(section(text, "Settings"))}
        assert settings == pages.method_keys(method), shown(page)


def test_every_public_name_and_module_is_in_the_api_pages():
    public = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    paths = re.findall(r"^::: (deltaw[\w.]+)$", public, re.MULTILINE)
    homes = []
    for name in (n for n in deltaw.__all__ if n != "METHODS"):
        room, attribute = deltaw._LATER.get(name, ("deltaw.errors", name))
        value = getattr(importlib.import_module(room), attribute)
        homes.append(f"{value.__module__}.{value.__qualname__}")
    assert sorted(paths) == sorted(homes)
    assert "`METHODS`" in public
    rooms = re.findall(r"^::: (deltaw[\w.]+)$", (DOCS / "api" / "rooms.md").read_text(encoding="utf-8"), re.MULTILINE)
    modules = [p for p in sources() if not (p.stem.startswith("__") or p.is_relative_to(SRC / "cli"))]
    assert len(modules) > 30
    assert sorted(rooms) == sorted(".".join(p.relative_to(SRC.parent).with_suffix("").parts) for p in modules)


# README ----------------------------------------------------------------------------------------------


def test_the_tree_names_every_folder_with_a_comment():
    named = pages.tree_in(section(README, "The tree"))
    assert len(named) > 10
    assert set(named) == pages.folders()


def test_the_walks_name_things_where_they_are():
    steps = re.findall(r"`(\w+)` in `([\w/]+\.py)`", section(README, "Three walks"))
    assert len(steps) >= 24
    for name, file in steps:
        tree = sources()[SRC / file]
        defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{file} has no {name}"


def test_the_first_recipe_loads(tmp_path, monkeypatch):
    from deltaw.train.recipe import load_recipe

    (block,) = code_blocks(section(README, "A first recipe"), "yaml")
    (tmp_path / "recipe.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert len(block.splitlines()) <= 12
    assert all(Path(path).is_file() for path in (recipe.data.train, recipe.data.valid))


@pytest.fixture
def tiny_base(tmp_path) -> Path:
    """A tiny random base whose tokenizer knows single characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from models import make_net

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(["<|end|>", *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    net = make_net("llama", vocab_size=len(letters) + 1, eos_token_id=0, bos_token_id=None)
    net.save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_python_example_runs(tiny_base, tmp_path, monkeypatch, capsys):
    (block,) = code_blocks(section(README, "From Python"), "python")
    names = {n.attr for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Attribute) and called(n.value) == "deltaw"}
    assert names <= set(deltaw.__all__) | {m.__name__ for m in METHODS}
    assert len(names) >= 4
    monkeypatch.chdir(tmp_path)
    seen: dict[str, object] = {}
    exec(compile(block.replace("smollm2-135m-instruct", str(tiny_base)), "README.md", "exec"), seen)
    assert seen["report"].probe.logit_max < 0.1
    assert not seen["changed"].equal(seen["plain"])
    assert "'event': 'done'" in capsys.readouterr().out


# Every page ---------------------------------------------------------------------------------------------


def command_lines(text: str) -> list[str]:
    """Lines of code blocks that call the program, continuation lines joined, without comments."""
    inside = "\n".join([*(body for _, body in FENCE.findall(text)), *re.findall(r"^    (?! ).*$", text, re.MULTILINE)])
    joined = re.sub(r"\\\n\s*", " ", "\n".join(line.strip() for line in inside.splitlines()))
    return [line for line in joined.splitlines() if line.startswith("deltaw ")]


def test_commands_in_the_pages_exist_with_their_flags():
    known = pages.commands()
    wrong, walked = [], 0
    for path in (p for p in TEXTS if p.name != "CHANGELOG.md"):
        for line in command_lines(path.read_text(encoding="utf-8").replace(" \\\n        ", " ")):
            if "COMMAND" in line:
                continue
            walked += 1
            words = shlex.split(line.replace("[", "").replace("]", ""), comments=True)
            name = next((c for c in known if words[: len(c.split())] == c.split()), None)
            if name is None:
                wrong.append(f"{shown(path)}: no such command: {line}")
                continue
            given = {w.partition("=")[0] for w in words if w.startswith("--")}
            wrong += [f"{shown(path)}: {name} has no {flag}" for flag in given - pages.flags(known[name])]
    assert walked > 30
    assert not wrong, wrong


def test_links_between_files_lead_somewhere():
    broken, walked = [], 0
    for path in TEXTS:
        for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)\s#]+)", path.read_text(encoding="utf-8")):
            walked += 1
            if not (path.parent / target).exists():
                broken.append(f"{shown(path)}: {target}")
    assert walked > 30
    assert not broken, broken


def nav_pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inner for page in nav_pages(part)]


def test_the_site_lists_every_page_once_and_loads_nothing_remote():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = nav_pages(site["nav"])
    there = [p.relative_to(DOCS).as_posix() for p in tracked_files() if p.is_relative_to(DOCS) and p.suffix == ".md"]
    assert len(there) > 20
    assert sorted(listed) == sorted(there)
    assert site["theme"]["font"] is False
    assert "http" not in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
