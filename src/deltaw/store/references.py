"""References to adapters in a registry: `name`, `name@3`, `name@label`, or the beginning of an id."""

from __future__ import annotations

import re
from dataclasses import dataclass

from deltaw.errors import RegistryError

CURRENT, CANDIDATE = "current", "candidate"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,31}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_V_VERSION = re.compile(r"[vV]\.?([0-9]+)")
_ID = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True)
class Reference:
    """What a reference says: a name with a version or a label, or (alone) the beginning of an id."""

    name: str = ""
    version: int | None = None
    label: str | None = None
    prefix: str | None = None


def parse_reference(text: str) -> Reference:
    """`name` is name@current; `name@3` a version, `name@label` a label; 8 or more hex digits begin an id.

    Raises RegistryError, with a hint for `name@v3`.
    """
    if _ID.fullmatch(text):
        return Reference(prefix=text)
    name, at, what = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name, label=CURRENT)
    if _VERSION.fullmatch(what):
        return Reference(name, version=int(what))
    check_label(what, f"{text!r}: ", name)
    return Reference(name, label=what)


def check_name(name: str) -> None:
    """Raise RegistryError unless `name` can name adapters: letters, digits, dot, dash, underscore; no id."""
    if not _NAME.fullmatch(name):
        raise RegistryError(
            f"{name!r} is no adapter's name: use letters, digits, '.', '-' and '_' (at most 100, a letter or digit "
            "first), as in support or support@3."
        )
    if _ID.fullmatch(name):
        raise RegistryError(
            f"{name!r} looks like an id (8 or more hex digits), so it cannot be a name. Choose another."
        )


def check_label(label: str, where: str = "", name: str = "NAME") -> None:
    """Raise RegistryError unless `label` is a word that cannot be taken for a version."""
    if hit := _V_VERSION.fullmatch(label):
        raise RegistryError(f"{where}versions are plain numbers; write {name}@{int(hit[1])}.")
    if not _LABEL.fullmatch(label):
        raise RegistryError(
            f"{where}{label!r} is neither a version (a number from 1 up) nor a label (a letter first, then letters, "
            "digits, '.', '-', '_')."
        )
