"""A short network that stands for a deep one: a few units of blocks, where the deep one's blocks are all alike."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from deltaw.core.site import LinearSite, find_blocks
from deltaw.core.spec import MethodSpec
from deltaw.core.targets import select, select_blocks
from deltaw.errors import DeltawError
from deltaw.model.attention import packs
from deltaw.model.empty import network_from
from deltaw.model.model import Model
from deltaw.plan.repeat import UNITS

_T = TypeVar("_T")
_NUMBERS = ("layer_idx",)
"""What a block's modules call its number; all else must be the same in every unit."""


@dataclass(frozen=True)
class Short:
    """How a short network stands for a deep one.

    settings  the short one's config.json, as text
    path      of the blocks, "model.layers"
    blocks    of the deep one
    period    blocks of a unit: those that come again together
    low       units before the inner ones (plan/repeat.py)
    """

    settings: str
    path: str
    blocks: int
    period: int
    low: int

    @property
    def config(self) -> dict[str, Any]:
        """The short network's config.json."""
        found: dict[str, Any] = json.loads(self.settings)
        return found

    @property
    def units(self) -> int:
        """Units of the deep network."""
        return self.blocks // self.period

    def block(self, name: str) -> int | None:
        """The short network's block that a tensor, a module or an adapter's parameter belongs to."""
        return _block(self.path, name)

    def unit(self, name: str) -> int | None:
        """The same, as a unit, counted from 0."""
        block = self.block(name)
        return None if block is None else block // self.period

    def times(self, name: str) -> int:
        """For how many of the deep network it stands: the first inner unit for all that the others do not."""
        return self.more + 1 if self.unit(name) == self.low else 1

    @property
    def more(self) -> int:
        """How many units the deep network has more."""
        return self.units - few(self.low)

    def whole(self, named: Mapping[str, _T]) -> dict[str, _T]:
        """What has names in the short network, by the names of the deep one, in its order."""
        found: dict[str, _T] = {}
        items = list(named.items())
        at = 0
        while at < len(items):
            unit = self.unit(items[at][0])
            stop = at + 1
            while stop < len(items) and unit is not None and self.unit(items[stop][0]) == unit:
                stop += 1
            for one in range(unit, unit + self.more + 1) if unit == self.low else (self._place(unit),):
                found |= {self._renamed(name, one): value for name, value in items[at:stop]}
            at = stop
        return found

    def _place(self, unit: int | None) -> int:
        return unit if unit is None or unit < self.low else self.more + unit  # type: ignore[return-value]

    def _renamed(self, name: str, unit: int) -> str:
        block = self.block(name)
        if block is None:
            return name
        head, tail = name.split(f"{self.path}.{block}", 1)
        return f"{head}{self.path}.{unit * self.period + block % self.period}{tail}"

    def sites(self, few: Mapping[str, LinearSite]) -> dict[str, LinearSite]:
        """The deep network's linear maps from those of the short one."""
        return dict(_sites(self, tuple(few.items())))

    def parts(self, named: Mapping[str, Tensor]) -> dict[int, list[Tensor]]:
        """Tensors by unit."""
        found: dict[int, list[Tensor]] = {}
        for name, tensor in named.items():
            if (unit := self.unit(name)) is not None:
                found.setdefault(unit, []).append(tensor)
        return found


@lru_cache(maxsize=64)
def _sites(short: Short, few: tuple[tuple[str, LinearSite], ...]) -> tuple[tuple[str, LinearSite], ...]:
    return tuple((name, replace(site, name=name)) for name, site in short.whole(dict(few)).items())


@lru_cache(maxsize=4096)
def _block(path: str, name: str) -> int | None:
    found = re.match(rf"(?:\w+:)?{re.escape(path)}\.(\d+)(?:\.|:|$)", name)
    return None if found is None else int(found.group(1))


def few(low: int) -> int:
    """Units of a short network."""
    return UNITS - 1 + low


def shortened(config: Mapping[str, Any], labels: Sequence[str] | None, low: int = 1) -> Short | None:
    """The short network of a config.json; None where its blocks are not alike, or few. Remembered by the config.

    Raises BaseError for a config that makes no network.
    """
    text = json.dumps(dict(config), sort_keys=True)
    return _shortened(text, None if labels is None else tuple(labels), low)


@dataclass(frozen=True)
class _Deep:
    """What is known of a deep network: its blocks' `path`, how many, and what `each` and the `rest` are made of.

    key      the setting that says how many blocks there are
    written  lists of the config with an entry for each block
    """

    key: str
    path: str
    blocks: int
    each: list[list[Any]]
    rest: list[Any]
    written: list[list[Any]]


@lru_cache(maxsize=64)
def _deep(text: str, labels: tuple[str, ...] | None) -> _Deep | None:
    """The deep network of a config.json; None where there is no one list of blocks."""
    config = json.loads(text)
    net: Any = network_from(config, torch.float32, labels)
    key = type(net.config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    blocks = getattr(net.config, "num_hidden_layers", None)
    lists = [n for n, m in net.named_modules() if isinstance(m, nn.ModuleList) and len(m) == blocks]
    if net.config.get_text_config() is not net.config or len(lists) != 1 or not isinstance(blocks, int):
        return None
    settings = _settings(config)
    written = [v for v in (*settings.values(), *vars(net.config).values()) if isinstance(v, list) and len(v) == blocks]
    return _Deep(key, lists[0], blocks, *_described(net, lists[0], blocks), written)


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != "num_hidden_layers"}


@lru_cache(maxsize=64)
def _shortened(text: str, labels: tuple[str, ...] | None, low: int) -> Short | None:
    deep = _deep(text, labels)
    if deep is None:
        return None
    blocks, settings = deep.blocks, _settings(json.loads(text))
    for period in range(1, blocks // (few(low) + 1) + 1):
        if blocks % period or any(v[i] != v[i % period] for v in (*deep.written, deep.each) for i in range(blocks)):
            continue
        n = few(low) * period
        cut = {k: v[:n] if isinstance(v, list) and len(v) == blocks else v for k, v in settings.items()}
        short = Short(json.dumps({**cut, deep.key: n}), deep.path, blocks, period, low)
        small = network_from(short.config, torch.float32, labels)
        return short if _described(small, deep.path, n) == (deep.each[:n], deep.rest) else None
    return None


def _described(net: nn.Module, path: str, blocks: int) -> tuple[list[list[Any]], list[Any]]:
    """What each block is made of but its number, and what is beside the blocks."""
    each: list[list[Any]] = [[] for _ in range(blocks)]
    rest: list[Any] = []
    owners: dict[int, int] = {}
    prefix = f"{path}."
    for name, module in net.named_modules():
        found = rest
        if name.startswith(prefix):
            number, _, name = name.removeprefix(prefix).partition(".")
            found = each[int(number)]
            if any(owners.setdefault(id(p), int(number)) != int(number) for p in module.parameters(recurse=False)):
                found.append(f"shares with {owners}")
        plain = {k: _plain(v) for k, v in vars(module).items() if k not in _NUMBERS}
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found.append((name, type(module), plain, [(n, t.shape, t.dtype) for n, t in tensors]))
    return each, rest


def _plain(value: Any) -> Any:
    """A value that can be compared: itself, or what kind of thing it is."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(_plain(v) for v in value)
    return type(value)


def deepen(model: Model, short: Short) -> None:
    """Let the short network, `model`, offer room in front of every layer of the deep one, though few will read it."""
    if (cache := model.places.virtual.get("cache")) is not None:
        model.places.virtual["cache"] = replace(cache, n_layers=short.blocks)


def is_alike(short: Short, spec: MethodSpec, model: Model) -> bool:
    """Whether `spec` does the same in every unit of the deep network, so that the short one, `model`, can stand for it.

    model  the short network, without adapters
    """
    if spec.new_tokens or any(character.isdigit() for character in "".join(spec.save_modules)):
        return False  # saved modules without a number are those of every block, or of none
    if spec.trains_base:
        return not spec.save_modules
    if spec.sits not in ("linear", "block"):
        return spec.sits == "input" or (model.kind == "causal" and packs(model.net))  # in the cache: see `deepen`
    few = model.places.sites
    sites = list(short.sites(few).values())
    try:
        at: list[Any] = select(spec, sites) if spec.sits == "linear" else select_blocks(spec, _halves(sites))
        here: list[Any] = list(model.places.chosen(spec).values())
    except DeltawError:  # the deep network says why
        return False
    shapes = {s.name: spec.shapes(s) for s in here}
    whole = {s.name: made for s in at if (made := spec.shapes(s)) or spec.sits == "block"}
    idle = spec.idle(at) or spec.idle(here)
    return not idle and short.whole(shapes) == whole and spec.shared_shapes(here) == spec.shared_shapes(at)


def _halves(sites: list[LinearSite]) -> list[Any]:
    return list(find_blocks(sites).values())
