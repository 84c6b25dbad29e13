"""Training. The package can be called: `deltaw.train(recipe)` is `deltaw.train.run.train(recipe)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from deltaw.train.events import Event


class _Room(ModuleType):
    """`import deltaw.train.recipe` puts this module where deltaw's function `train` is looked for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Event]:
        from deltaw.train.run import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
