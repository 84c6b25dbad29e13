"""What operations make of tensors on the meta device: worked out once in a process, since PyTorch does it in Python."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor

_META = torch.device("meta")
_LISTS = (list, tuple)
_MOST_MADE = 1 << 15
_MADE: dict[Any, tuple[tuple[Any, ...] | None, ...]] = {}
"""What operations make of which shapes; None: a gradient that is not asked for."""
_DTYPES: dict[Any, torch.dtype] = {}
"""In which dtype pointwise operations answer, by those of their arguments."""
_WHAT: dict[int, tuple[Any, int | str | None, bool]] = {}
"""Operations by id, and what they do; they are kept, so that no other gets the id."""


def tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which are values and lists of values."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, _LISTS):
            found += tensors(value)
    return found


def made(func: Any, args: Any, kwargs: Any, known: Container[int]) -> Any:
    """What `func`, all of whose results are new, makes of tensors on the meta device; known: storages there are."""
    key = id(func), _described(args), tuple(kwargs), _described(kwargs.values()) if kwargs else ()
    found = _MADE.get(key)
    if found is not None:
        new = [one and torch.empty_strided(one[0], one[1], dtype=one[2], device=_META) for one in found]
        return new[0] if len(new) == 1 else tuple(new)
    kind = None
    if torch.Tag.pointwise in func.tags and (size := _even(args)) is not None:
        kind = id(func), tuple((t.dtype, t.ndim > 0) if isinstance(t, Tensor) else type(t) for t in args), key[2:]
        if (dtype := _DTYPES.get(kind)) is not None:
            out = torch.empty(size, dtype=dtype, device=_META)
            _MADE[key] = ((out.size(), out.stride(), dtype),)
            return out
    out = func(*args, **kwargs)
    results = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
    if results and all(t is None or (isinstance(t, Tensor) and _is_new(t, known)) for t in results):
        if len(_MADE) >= _MOST_MADE:
            _MADE.clear()
        _MADE[key] = tuple(None if t is None else (t.size(), t.stride(), t.dtype) for t in results)
        if kind is not None and len(results) == 1 and out.size() == size and out.is_contiguous():
            _DTYPES[kind] = out.dtype
    return out


def _even(args: Any) -> torch.Size | None:
    """The size of what a pointwise operation makes of arguments that are all contiguous; None where they are not."""
    found = [t for t in args if isinstance(t, Tensor)]
    if not found or not all(t.is_contiguous() for t in found):
        return None
    sizes = {t.size() for t in found}
    return sizes.pop() if len(sizes) == 1 else torch.broadcast_shapes(*sizes)


def _is_new(t: Tensor, known: Container[int]) -> bool:
    """Whether `t` has a storage of its own that is as large as its shape says."""
    alone = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=_META)
    size = t.untyped_storage().nbytes()
    return t.is_meta and t.untyped_storage()._cdata not in known and alone.untyped_storage().nbytes() == size


def _described(values: Iterable[Any]) -> tuple[Any, ...]:
    """Values as a key: of tensors what a result's shape can depend on; 1, 1.0 and True are told apart."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.size(), value.stride(), value.dtype))
        elif isinstance(value, _LISTS):
            found.append(_described(value))
        else:
            found.append((type(value), value))
    return tuple(found)


def what(func: Any) -> tuple[Any, int | str | None, bool]:
    """An operation; which argument it writes and returns, changing no shape; whether all that it gives is new."""
    found = _WHAT.get(id(func))  # an operation hashes itself in Python
    if found is None:
        found = _WHAT[id(func)] = func, _written(func), _makes(func)
    return found


def _written(func: Any) -> int | str | None:
    """Which argument an operation writes and returns, changing no shape: 0, the first, or "out"; None: it does more."""
    results, arguments = func._schema.returns, func._schema.arguments
    if torch.Tag.inplace_view in func.tags or len(results) != 1:
        return None
    alias = results[0].alias_info
    if alias is None or not alias.is_write:
        return None
    owner = next(a for a in arguments if a.alias_info is not None and a.alias_info.before_set == alias.before_set)
    return 0 if owner is arguments[0] else "out" if owner.name == "out" else None


def _makes(func: Any) -> bool:
    """Whether all that an operation gives is new."""
    results = func._schema.returns
    return bool(results) and all(r.alias_info is None and str(r.type) == "Tensor" for r in results)
