"""Which sites a method's settings name. Pure matching of strings; a name that matches nothing is an error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

from deltaw.core.site import BlockSite, LinearSite
from deltaw.core.spec import MethodSpec
from deltaw.errors import TargetError, near

ALL_LINEAR = "all-linear"
_S = TypeVar("_S", LinearSite, BlockSite)


def matches(names: str | Sequence[str] | None, path: str) -> bool:
    """Whether `path` is named: a regular expression must match it whole, a list by name or dotted suffix."""
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith("." + name) for name in names)


def _compiled(pattern: str, setting: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise TargetError(f"{setting}: {pattern!r} is not a regular expression: {error}.") from None


def _all_linear(site: LinearSite) -> bool:
    return site.kind != "embedding" and not site.is_head


def select(spec: MethodSpec, sites: Sequence[LinearSite]) -> list[LinearSite]:
    """The sites that `spec` targets, in the model's order.

    Raises TargetError when a target, an exclusion or a layer number matches nothing; the message lists near
    names. A site below a module of `save_modules` is never targeted (that module trains whole).
    """
    targets = spec.targets
    if isinstance(targets, str):
        _compiled(targets, "targets")
    if isinstance(spec.exclude, str):
        _compiled(spec.exclude, "exclude")
    if isinstance(targets, str) and (own := spec.choose(list(sites))) is not None:
        chosen = own
        if not chosen:
            raise TargetError(f"targets={targets!r} finds no place in this model: name some. " + _known(sites))
    elif isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        chosen = [s for s in sites if _all_linear(s)]
    elif isinstance(targets, str):
        chosen = [s for s in sites if matches(targets, s.name)]
        if not chosen:
            raise TargetError(f"No linear map matches the expression {targets!r}. " + _known(sites))
    else:
        _refuse_unmatched("target", targets, sites)
        chosen = [s for s in sites if matches(targets, s.name)]
    if spec.exclude and not isinstance(spec.exclude, str):
        _refuse_unmatched("exclude", spec.exclude, sites)
    chosen = [s for s in chosen if not matches(spec.exclude, s.name) and not _is_saved(spec, s)]
    chosen = _in_layers(spec, chosen)
    if not chosen:
        raise TargetError(f"targets={targets!r} with exclude={spec.exclude!r} leaves no place to train.")
    return chosen


def select_blocks(spec: MethodSpec, sites: Sequence[BlockSite]) -> list[BlockSite]:
    """The halves of blocks that `spec` sits at, by `layers` and `exclude`. Raises TargetError as `select` does."""
    chosen = [s for s in sites if spec.sits_at(s)]
    if not chosen:
        raise TargetError(f"Method {spec.name!r} sits behind a block's attention or feed-forward; found neither here.")
    if spec.exclude:
        if isinstance(spec.exclude, str):
            _compiled(spec.exclude, "exclude")
        if not any(matches(spec.exclude, s.name) for s in chosen):
            raise TargetError(f"exclude {spec.exclude!r} matches none of: {', '.join(s.name for s in chosen[:4])} ...")
        chosen = [s for s in chosen if not matches(spec.exclude, s.name)]
    chosen = _in_layers(spec, chosen)
    if not chosen:
        raise TargetError(f"exclude={spec.exclude!r} leaves no place to train.")
    return chosen


def _in_layers(spec: MethodSpec, chosen: list[_S]) -> list[_S]:
    """Those in the blocks that `layers` asks for."""
    wanted = spec.layer_numbers()
    if wanted is None:
        return chosen
    there = {s.layer for s in chosen if s.layer is not None}
    missing = sorted(wanted - there)
    if missing:
        span = f"{min(there)} to {max(there)}" if there else "none"
        raise TargetError(f"layers: {missing} not among the targeted blocks (there are {span}).")
    return [s for s in chosen if s.layer in wanted]


def _is_saved(spec: MethodSpec, site: LinearSite) -> bool:
    return any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", site.name) for m in spec.save_modules)


def _refuse_unmatched(setting: str, names: Sequence[str], sites: Sequence[LinearSite]) -> None:
    missing = [n for n in names if not any(matches([n], s.name) for s in sites)]
    if missing or not names:
        roles = sorted({s.role for s in sites})
        hints = "".join(near(m, roles) for m in missing)
        raise TargetError(
            f"{setting} {', '.join(map(repr, missing)) or '[]'} matches no linear map of this model.{hints} "
            + _known(sites)
        )


def _known(sites: Sequence[LinearSite]) -> str:
    return f"It has: {', '.join(sorted({s.role for s in sites}))}."
