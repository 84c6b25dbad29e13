"""A new base means a new adapter: train it again from the recipe that the old one carries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deltaw.core.adapter import Adapter
from deltaw.data.source import data_hash, read_rows
from deltaw.errors import DataError, RecipeError
from deltaw.store.peft import read_adapter
from deltaw.train.events import Event
from deltaw.train.recipe import Recipe, load_recipe
from deltaw.train.run import train


def readapt(
    adapter: Adapter | str | Path,
    base: str | Path,
    out: str | Path,
    *,
    data: str | Path | None = None,
    valid: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Iterator[Event]:
    """Train an adapter again on another base, with the recipe and the rows of the first; yields train's events.

    adapter  an Adapter, or the folder of one, that deltaw trained
    base     what the new one is for: a folder, hub id, .gguf file or starter name
    out      the new run's folder; the same call goes on where it stopped
    data     training rows to use instead of those that the recipe names; valid likewise

    The new adapter's provenance has the old one's id as its parent.

    Raises RecipeError (the adapter carries no recipe), DataError (its rows are gone, or not those that it learned), and
    what `train` raises. Nothing runs before the first event is asked for.
    """
    old = adapter if isinstance(adapter, Adapter) else read_adapter(Path(adapter))
    recipe = stored_recipe(old, base, data, valid)
    yield from train(recipe, out, parents=[old.id], say=say)


def stored_recipe(
    old: Adapter, base: str | Path, data: str | Path | None = None, valid: str | Path | None = None
) -> Recipe:
    """The recipe of an adapter for another base, its rows found and equal to those learned. Raises as `readapt`."""
    plain = old.provenance.get("recipe")
    if not isinstance(plain, dict) or "adapter" not in plain:
        raise RecipeError(
            f"Adapter {old.id[:12]} carries no recipe (deltaw did not train it, or it was made from others): write "
            "one, then `deltaw train`."
        )
    try:
        recipe = load_recipe({**plain, "base": {**plain["base"], "path": str(base)}})
    except (RecipeError, KeyError, TypeError) as problem:
        raise RecipeError(f"The recipe that adapter {old.id[:12]} carries does not load: {problem}") from None
    files: dict[str, Any] = {}
    if data is not None:
        files["train"] = str(data)
    else:
        _check_rows(recipe.data.train, old.provenance.get("data_hash"), old.id[:12])
    if valid is not None:
        files["valid"] = str(valid)
    elif recipe.data.valid is not None and not _is_there(recipe.data.valid):
        raise DataError(
            f"The validation rows of adapter {old.id[:12]}, {recipe.data.valid}, are gone: give --valid FILE."
        )
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=files)})


def _is_there(source: str) -> bool:
    return source.startswith("hf:") or Path(source).is_file()


def _check_rows(source: str | None, wanted: str | None, name: str) -> None:
    """Raise DataError unless the rows are there and those that the adapter learned."""
    if source is None:
        raise DataError(f"Adapter {name} was trained on rows in memory: give them as a file with --data FILE.")
    if not _is_there(source):
        raise DataError(f"The rows of adapter {name}, {source}, are gone: give them, or others, with --data FILE.")
    if (found := data_hash(read_rows(source))) != wanted:
        raise DataError(
            f"{source} is not what adapter {name} learned (its rows hash to {found[:12]}, they were "
            f"{str(wanted)[:12]}): restore it, or name it with --data to train on it as it is."
        )
