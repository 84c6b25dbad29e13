"""What all pictures of a lab share: the base, its adapters, and what was computed before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from pathlib import Path
from threading import Lock, RLock
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaw.core.site import LinearSite
from deltaw.core.spec import MethodSpec
from deltaw.errors import BadInput
from deltaw.lab.soon import Soon
from deltaw.merge.factors import Directions, directions
from deltaw.model.base import load_base
from deltaw.model.model import Model
from deltaw.plan.kept import Kept
from deltaw.plan.network import Base, find_config, network_of, shapes

KEPT = 512
"""Results that are kept; the oldest goes first."""
KEPT_BYTES = 2**27
"""Of decomposed matrices; the least recently used goes first."""
PLANNED = 96
"""Models without memory of picture 11: three for every shape, and those of new ranks."""
PROMPT = "The capital of France is"
"""What the base reads where a picture needs a real input of a linear map."""
OWN = ("base", "lesson", "peek")
"""Names that a given adapter cannot have."""

T = TypeVar("T")


def empty(name: str) -> Model:
    """The network of a base or a shape, without memory for its weights."""
    config, folder = find_config(name)
    return Model(network_of(Base(name, config, folder)))


def parameters(model: Model) -> int:
    """Parameters of a base; tied ones count once."""
    return sum(p.numel() for p in model.net.parameters())


@cache
def shipped() -> dict[str, Model]:
    """The network of every shape that is shipped, without memory for its weights; nobody changes them."""
    return {name: empty(name) for name in shapes()}


class Lab:
    """A base with its adapters, loaded when they are first needed, and a cache.

    base      a folder, a hub id or a starter name
    adapters  name -> folder of an adapter that is attached beside the base

    Work is done by one thread at a time (`lock`), plans by one (`planning`); what is kept is read without waiting.
    """

    def __init__(
        self, base: str, adapters: Mapping[str, Path] | None = None, say: Callable[[str], None] | None = None
    ) -> None:
        self.base = base
        self.label = Path(base).name
        self.given = dict(adapters or {})
        if wrong := [name for name in self.given if name in OWN or not name.isidentifier()]:
            raise BadInput(f"an adapter cannot be called {wrong[0]!r}: use letters and digits; not base, lesson, peek.")
        self.say = say
        self.lock = RLock()
        self._kept: OrderedDict[Any, Any] = OrderedDict()
        self.planned = Kept(models=PLANNED)
        self.planning = Lock()
        self.soon = Soon()
        self.lesson: Any = None  # of pictures 9 and 10 (live.py)
        self.merged: Any = None
        self._directions: OrderedDict[tuple[int, str], Directions] = OrderedDict()

    def keep(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` gives; the second time under this key it is remembered."""
        found: T | None = self._kept.get(key)
        if found is not None:
            return found
        with self.lock:
            found = self._kept.get(key)
            if found is None:
                found = self._kept[key] = make()
                if len(self._kept) > KEPT:
                    self._kept.popitem(last=False)
            return found

    def kept(self, key: Any) -> Any:
        """What is remembered under a key; None: nothing."""
        return self._kept.get(key)

    @cached_property
    def model(self) -> Model:
        """The base, with the given adapters attached and none in use. Raises BadInput for a base without answers."""
        model = load_base(self.base, dtype="auto", say=self.say)
        if model.kind != "causal" or model.tokenizer is None:
            raise BadInput(f"the lab needs a base that continues text; {self.label} does not.")
        for name, folder in self.given.items():
            model.attach(folder, name)
        model.use(None)
        return model

    @cached_property
    def linear(self) -> dict[tuple[int, str], LinearSite]:
        """The linear maps inside the blocks, by (layer, role), in the model's order."""
        return {
            (s.layer, s.role): s
            for s in self.model.places.sites.values()
            if s.layer is not None and s.kind != "embedding" and not s.is_head
        }

    @property
    def layers(self) -> int:
        """How many blocks the base has."""
        return 1 + max(layer for layer, _ in self.linear)

    @property
    def roles(self) -> list[str]:
        """The linear maps of a block: q_proj, k_proj ..."""
        return list(dict.fromkeys(role for _, role in self.linear))

    def site(self, layer: int, role: str) -> LinearSite:
        """One linear map. Raises BadInput where that block has none of this name."""
        if (layer, role) not in self.linear:
            raise BadInput(f"block {layer} has no {role}.")
        return self.linear[layer, role]

    def weight(self, layer: int, role: str) -> Tensor:
        """W [out, in] of a linear map, float32."""
        return self.model.places.weights[self.site(layer, role).name].dense(torch.float32)

    def directions(self, layer: int, role: str) -> Directions:
        """The singular values of a linear map's W, and its directions. Those used last are kept (KEPT_BYTES)."""
        kept, key = self._directions, (layer, role)
        with self.lock:
            if key not in kept:
                kept[key] = directions(self.weight(layer, role), f"block {layer} {role}")
            kept.move_to_end(key)
            while len(kept) > 1 and sum(d.nbytes for d in kept.values()) > KEPT_BYTES:
                kept.popitem(last=False)
            return kept[key]

    def inputs(self) -> dict[str, Tensor]:
        """What each linear map reads at the last token of PROMPT: [in] float32 by name of the map."""
        return self.keep("inputs", self._inputs)

    @torch.no_grad()
    def _inputs(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        model = self.model
        modules = dict(model.net.named_modules())
        hooks = []
        for site in self.linear.values():

            def note(_: Any, given: tuple[Tensor, ...], name: str = site.name) -> None:
                found[name] = given[0].reshape(-1, given[0].shape[-1])[-1].float().clone()

            hooks.append(modules[site.name].register_forward_pre_hook(note))
        try:
            model.use(None)
            model.logits(model.tokenizer(PROMPT, return_tensors="pt")["input_ids"])
        finally:
            for hook in hooks:
                hook.remove()
        return found

    # Shapes: bases of which no weight is here ------------------------------------------------------

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Parameters of this base and of every shape that is shipped, the smallest first."""
        counted = {name: parameters(self.shape(name)) for name in (self.label, *shipped())}
        return dict(sorted(counted.items(), key=lambda item: item[1]))

    def path(self, name: str) -> str:
        """What `deltaw plan --base` would be given for a name of `sizes`."""
        return self.base if name == self.label else name

    @cached_property
    def _own_shape(self) -> Model:
        return empty(self.base)

    def shape(self, name: str) -> Model:
        """A network without memory for its weights."""
        if name != self.label:
            return shipped()[name]
        return self._own_shape

    def trained(self, name: str, spec: MethodSpec) -> dict[str, int]:
        """How many numbers `spec` trains at each linear map of a shape. Raises TargetError."""
        chosen = self.shape(name).places.chosen(spec)
        sizes = {n: spec.shapes(site) for n, site in chosen.items()}
        return {n: sum(torch.Size(shape).numel() for shape in parts.values()) for n, parts in sizes.items()}
