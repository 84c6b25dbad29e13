"""What went wrong. The package can be called: `deltaw.diagnose(path)` is `deltaw.diagnose.diagnose.diagnose(path)`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.diagnose.diagnose import Diagnosis


class _Room(ModuleType):
    """`import deltaw.diagnose.curve` puts this module where deltaw's function `diagnose` is looked for."""

    def __call__(self, *args: Any, **kwargs: Any) -> Diagnosis:
        from deltaw.diagnose.diagnose import diagnose

        return diagnose(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
