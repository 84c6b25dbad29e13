"""One file per method. `METHODS` is the registry: adding a method is its file and one line here, with its import."""

from __future__ import annotations

from typing import Any

from deltaw.core.spec import MethodSpec
from deltaw.errors import SpecError, near
from deltaw.methods.bitfit import BitFit as BitFit
from deltaw.methods.dora import Dora as Dora
from deltaw.methods.full import Full as Full
from deltaw.methods.houlsby import Houlsby as Houlsby
from deltaw.methods.ia3 import Ia3 as Ia3
from deltaw.methods.longlora import LongLora as LongLora
from deltaw.methods.lora import Lora as Lora
from deltaw.methods.prefix import PrefixTuning as PrefixTuning
from deltaw.methods.prompt import Prompt as Prompt
from deltaw.methods.ptuning import PTuning as PTuning
from deltaw.methods.vera import Vera as Vera

METHODS: tuple[type[MethodSpec], ...] = (
    Lora,
    Dora,
    LongLora,
    Vera,
    Ia3,
    BitFit,
    Houlsby,
    Prompt,
    PrefixTuning,
    PTuning,
    Full,
)


def method_class(name: str) -> type[MethodSpec]:
    """The method called `name` in recipes and files; SpecError with the near name if there is none."""
    known = {m.name: m for m in METHODS}
    if name not in known:
        raise SpecError(f"unknown method {name!r}.{near(name, known)} Known: {', '.join(sorted(known))}.")
    return known[name]


def spec_from(settings: dict[str, Any]) -> MethodSpec:
    """A method's settings from plain data, as a recipe or deltaw.json holds it: {"method": "lora", ...}."""
    return method_class(str(settings.get("method", "lora")))(**settings)
