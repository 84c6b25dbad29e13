"""Is this the base that the adapter was trained on?"""

from __future__ import annotations

import warnings

from deltaw.core.fingerprint import HARD, BaseFingerprint
from deltaw.errors import BaseMismatch


class OtherBaseWarning(UserWarning):
    """The base differs in a way that an adapter survives, or cannot be checked."""


def compare(adapter: BaseFingerprint | None, base: BaseFingerprint | None, allow_other_base: bool = False) -> None:
    """Raise BaseMismatch when weights, architecture or vocabulary differ; warn about format and chat template.

    An adapter without a fingerprint (a foreign one) is "unknown": said once. A base without one (made in
    memory) is not compared.
    """
    if base is None:
        return
    if adapter is None:
        warnings.warn(
            "This adapter does not say which base it was trained on: unknown, not checked.",
            OtherBaseWarning,
            stacklevel=3,
        )
        return
    found = adapter.differences(base)
    hard = {k: v for k, v in found.items() if k in HARD}
    lines = told_differences(found, "adapter")
    if hard and not allow_other_base:
        raise BaseMismatch(
            "The adapter was trained on another base.\n"
            + "\n".join(lines)
            + f"\n  Load the base it names ({adapter.short()}; this is {base.short()}), "
            "or pass allow_other_base=True (--allow-other-base) to try anyway."
        )
    if found:
        warnings.warn("The base differs from the adapter's:\n" + "\n".join(lines), OtherBaseWarning, stacklevel=3)


def told_differences(found: dict[str, tuple[str, str]], what: str) -> list[str]:
    """A line for each field that differs (BaseFingerprint.differences): what `what` has, and what this model has."""
    return [f"  {field}: {what} has {mine}, this model has {its}" for field, (mine, its) in found.items()]
