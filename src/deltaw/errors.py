"""Every exception of deltaw.

    DeltawError                     root; `exit_code` is what the command line returns (1: the work failed)
    |-- BadInput (ValueError)       something we were given cannot be used (2)
    |   |-- SpecError               a method's settings: rank 0, alpha NaN, an unknown key
    |   |-- TargetError             a target name matches nothing; near names are listed
    |   |-- RecipeError             a recipe: unknown key (with the near name), impossible value
    |   |-- DataError               a row or a file of rows, with file and line
    |   |-- ShapeError              a tensor has another shape than its place
    |   |-- AdapterError            a saved adapter: unknown, missing, misshapen or broken tensors
    |   |   `-- BaseMismatch        an adapter meets another base than the one it was trained on
    |   |-- BaseError               a base model: not found, not loadable, not supported
    |   |-- BudgetError             nothing that a recipe allows fits its memory budget
    |   |-- RegistryError           a registry refuses: a bad reference, something in use, no index
    |   |-- RunError                an output folder holds another run, a checkpoint does not fit
    |   |-- ServeError              a server's settings, keys, names or budgets
    |   `-- NotMergeable            a method whose change cannot be written into the base's weights
    |-- NotFound (LookupError)      a name that is not there: adapter, site, starter (2)
    `-- WorkFailed (RuntimeError)   the work itself failed: no space, NaN loss, NaN weights (1)

A message says what failed, what was found and what to do, with the values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DeltawError(Exception):
    """Root of every error that deltaw raises on purpose."""

    exit_code = 1


class BadInput(DeltawError, ValueError):
    """Something we were given cannot be used."""

    exit_code = 2


class SpecError(BadInput):
    """A method's settings make no sense."""


class TargetError(BadInput):
    """A target name, pattern or layer matches nothing in this model."""


class RecipeError(BadInput):
    """A recipe has an unknown key or an impossible value."""


class DataError(BadInput):
    """A row or a file of rows cannot be used; the message names file and line."""


class ShapeError(BadInput):
    """A tensor has another shape than the place it is meant for."""


class AdapterError(BadInput):
    """A saved adapter cannot be read, or does not fit the model strictly."""


class BaseMismatch(AdapterError):
    """An adapter meets a base other than the one it was trained on."""


class BaseError(BadInput):
    """A base model cannot be found, read or supported."""


class RegistryError(BadInput):
    """A registry refuses: a name or reference that makes no sense, something that is in use, an index that is gone."""


class RunError(BadInput):
    """An output folder holds another run, or a checkpoint does not fit this one."""


class BudgetError(BadInput):
    """Nothing that a recipe allows fits its memory budget; the message names the smallest that would."""


class ServeError(BadInput):
    """A server's settings, keys, names or budgets cannot be used."""


class NotMergeable(BadInput):
    """A method's change cannot be written into the base's weights."""


class NotFound(DeltawError, LookupError):
    """A name that is not there."""

    exit_code = 2


class WorkFailed(DeltawError, RuntimeError):
    """The work itself failed although the input was usable."""


def near(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.5) -> str:
    """A hint like " Did you mean 'rank'?", or "" when nothing known is near `name` (1: equal, 0: nothing in common)."""
    found = difflib.get_close_matches(name, list(known), n=n, cutoff=cutoff)
    return f" Did you mean {' or '.join(repr(f) for f in found)}?" if found else ""
