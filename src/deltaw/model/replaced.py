"""Which tensors of the base an adapter replaces whole: modules that train beside the method, and biases of norms."""

from __future__ import annotations

from torch import Tensor, nn

from deltaw.core.spec import MethodSpec
from deltaw.errors import TargetError, near
from deltaw.model.frozen import FrozenLinear
from deltaw.model.places import Places


def swapped(spec: MethodSpec, places: Places) -> dict[str, Tensor]:
    """The base's tensors that `spec` replaces whole: those of `save_modules`, and biases of norms."""
    found = {n: t for module in saved_modules(spec, places) for n, t in own_tensors(module, places)}
    return found | dict(_other_biases(places) if spec.trains_norm_biases else ())


def owners(spec: MethodSpec, places: Places) -> set[str]:
    """The modules whose tensors `save_modules` replaces."""
    return {n.rpartition(".")[0] for module in saved_modules(spec, places) for n, _ in own_tensors(module, places)}


def saved_modules(spec: MethodSpec, places: Places) -> list[str]:
    """The modules whose path ends in a name of `save_modules`, as PEFT matches them: "norm" is every norm."""
    found: list[str] = []
    for wanted in spec.save_modules:
        hits = [n for n in places.modules if n == wanted or n.endswith(wanted)]
        if not hits:
            roles = sorted({n.rsplit(".", 1)[-1] for n in places.modules if n})
            raise TargetError(f"save_modules {wanted!r} matches no module.{near(wanted, roles)}")
        found += [h for h in hits if h not in found]
    return found


def own_tensors(module: str, places: Places) -> list[tuple[str, Tensor]]:
    """The base's parameters inside one module, by full names, whatever wears adapters now.

    Raises TargetError for a module whose weight is quantised: it is only read, so nothing can take its place.
    """
    found: list[tuple[str, Tensor]] = []
    for path, inner in places.modules.items():
        if path != module and not path.startswith(module + "."):
            continue
        if isinstance(inner, FrozenLinear):
            raise TargetError(
                f"save_modules names {module}, but {path}.weight is quantised and only read.\n"
                "  Adapt it (name it in targets), or load the base with format='dense'."
            )
        found += [(f"{path}.{name}", p) for name, p in inner.named_parameters(recurse=False)]
    return found


def _other_biases(places: Places) -> list[tuple[str, Tensor]]:
    """Biases that belong to no linear map: those of norms."""
    return [
        (f"{name}.bias", bias)
        for name, module in places.modules.items()
        if name not in places.sites and isinstance(bias := getattr(module, "bias", None), nn.Parameter)
    ]
