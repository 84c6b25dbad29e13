"""Run the real computation on the meta device and see what it would keep in memory, moment by moment.

Nothing is computed and nothing is allocated: tensors have shapes only. But every operation of the network, of the
method, of the loss and of their backwards is called as in a real step, so any architecture and method is covered, and
the plan cannot drift from the code.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from deltaw.model import fuse
from deltaw.ops.arena import ALIGN, Arena
from deltaw.ops.block import Block
from deltaw.plan.heap import SETTLED, most_held

_ITEM = torch.ops.aten._local_scalar_dense.default
_RAND, _DRAWN = torch.ops.aten.rand.default, torch.ops.aten.rand.generator
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_PATCHED = threading.RLock()
_GONE = 1 << 20
"""Fewer bytes than these are alive where a graph is gone: the loss and the batch."""
CAUSES = ("activations", "logits", "workspace", "gradients")
KEPT, LENT = "kept:", "lent:"
"""Stand before the cause of what an arena (ops/arena.py) keeps, or lends for a moment: it is no part of the heap."""


@dataclass
class Timeline:
    """What was allocated and freed, in order.

    events    (storage, bytes), bytes negative where it is freed
    cause     of each storage, which are numbered as they are allocated: one of CAUSES, behind KEPT or LENT
    lent      the most bytes that an arena lent at once
    unseen    what an arena kept at its peak beyond the tensors that were alive: a lease may outlive them
    parts     (after, at, part): at event `at` an operation first reads this part of the network (`Tracer`); from event
              `after` on, none reads the part before
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    cause: list[str] = field(default_factory=list)
    parts: list[tuple[int, int, int]] = field(default_factory=list)
    lent: int = 0
    unseen: int = 0

    def settled(self) -> Timeline:
        """The same, where gradients that are handed on one after the other come by size, then by what they copy.

        Autograd leaves their order open, and takes another one in each block. Parts are kept apart.
        """
        bounds = {at for part in self.parts for at in part[:2]}
        events = list(self.events)
        run: list[int] = []
        for i in [*self._handed_on(), len(events) + 1]:
            if run and (i != run[-1] + 2 or i in bounds):
                pairs = sorted((self.events[a : a + 2] for a in run), key=lambda pair: (pair[0][1], pair[1][0]))
                events[run[0] : run[-1] + 2] = [event for pair in pairs for event in pair]
                run = []
            run.append(i)
        if events == self.events:
            return self
        number: dict[int, int] = {}
        numbered = [(number.setdefault(n, len(number)), size) for n, size in events]
        return replace(self, events=numbered, cause=[self.cause[n] for n in number])

    def _handed_on(self) -> list[int]:
        """The events where a gradient is copied: allocated, and what was computed is freed in the next."""
        events, cause = self.events, self.cause
        copies = [i for i, (number, size) in enumerate(events) if size > 0 and cause[number] == "gradients"]
        return [i for i in copies if events[i + 1 : i + 2] and events[i + 1][1] == -events[i][1]]

    def peak(self) -> dict[str, int]:
        """Bytes by cause at the moment when most is alive."""
        alive = list(accumulate((size for _, size in self.events), initial=0))
        at = alive.index(max(alive))
        found = dict.fromkeys(CAUSES, 0)
        for number, size in self.events[:at]:
            found[self.cause[number].rpartition(":")[2]] += size
        return found

    def arena(self) -> int:
        """Bytes that an arena touches. Its two stacks grow to their own peaks, and never shrink."""
        return self.kept() + self.unseen + self.lent

    def kept(self) -> int:
        """The most bytes of tensors that an arena kept at once, in its steps of ALIGN."""
        now = most = 0
        for number, size in self.events:
            if self.cause[number].startswith(KEPT):
                now += -(-abs(size) // ALIGN) * (ALIGN if size > 0 else -ALIGN)
                most = max(most, now)
        return most

    def held(self, repeats: int = 3) -> int:
        """The most that glibc's heap holds when the work is done `repeats` times, one after the other.

        What is left of a time, gradients, goes with its step.
        """
        events: list[tuple[int, int]] = []
        of_graph = 0
        for number, size in self.events:
            if self.cause[number].startswith((KEPT, LENT)):
                continue
            events.append((number, size))
            of_graph += size if self.cause[number] != "gradients" else 0
            if size < 0 and of_graph < _GONE:
                events.append(SETTLED)
        return most_held(events, len(self.cause), repeats)


class Tracer(TorchDispatchMode):
    """Inside, operations on meta tensors run and are recorded; `timeline` is the record.

    known   tensors that are there already and are not counted
    wide    the vocabulary: a tensor with this many columns is counted as logits
    parts   a part's number -> its tensors; `timeline.parts` says when operations go from one part to another

    What an operation makes is the same for the same shapes: it is worked out once, and what only writes into tensors
    that are there is not worked out at all.
    """

    def __init__(
        self, known: Iterable[Tensor] = (), wide: int | None = None, parts: Mapping[int, Iterable[Tensor]] | None = None
    ) -> None:
        super().__init__()
        self.timeline = Timeline()
        self._wide = wide
        self._ids: dict[int, int] = {t.untyped_storage()._cdata: -1 for t in known}
        self._part_of = {t.untyped_storage()._cdata: n for n, of_one in (parts or {}).items() for t in of_one}
        self._part: int | None = None
        self._after = 0
        self._made: dict[Any, tuple[tuple[Any, ...], ...]] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._alive: dict[int, int] = {}
        self._phase = self._kept = 0
        self._of_phase: dict[int, int] = {}
        self._in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        on_meta = [t for t in tensors if t.is_meta]
        if on_meta:
            if func is _ITEM:
                return 1.0
            if len(on_meta) < len(tensors):
                args, kwargs = tree_map_only(
                    Tensor, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"), (args, kwargs)
                )
            if "generator" in kwargs:
                kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        elif func is _DRAWN:  # what dropout's mask is made of: nobody needs the numbers
            func, kwargs = _RAND, {k: v for k, v in kwargs.items() if k != "generator"} | {"device": "meta"}
        in_part = bool(self._part_of) and self._read(on_meta)
        backward = torch._C._current_graph_task_id() != -1
        if backward != self._in_backward:
            self._turn(backward)
        if not on_meta:
            out = func(*args, **kwargs)
        elif (written := _written(func)) is not None:
            out = args[0] if written == 0 else kwargs["out"]
        else:
            out = self._result(func, args, kwargs) if _makes(func) else func(*args, **kwargs)
        for t in _tensors(out if isinstance(out, list | tuple) else (out,)):
            if t.is_meta:
                self._see(t)
        if in_part:
            self._after = len(self.timeline.events)
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What `func` makes of tensors on the meta device."""
        key = func, _described(args), tuple(kwargs), _described(kwargs.values())
        found = self._made.get(key)
        if found is not None:
            made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in found]
            return made[0] if len(made) == 1 else tuple(made)
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple) else []
        if made and all(isinstance(t, Tensor) and self._is_new(t) for t in made):
            self._made[key] = tuple((t.size(), t.stride(), t.dtype) for t in made)
        return out

    def _is_new(self, t: Tensor) -> bool:
        """Whether `t` has a storage of its own that is as large as its shape says."""
        alone = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device="meta")
        size = t.untyped_storage().nbytes()
        return t.is_meta and t.untyped_storage()._cdata not in self._ids and alone.untyped_storage().nbytes() == size

    def part_of(self, tensor: Tensor) -> int | None:
        """The part of the network that a tensor belongs to."""
        return self._part_of.get(tensor.untyped_storage()._cdata) if self._part_of else None

    def enter(self, part: int) -> None:
        """From now on this part computes."""
        if part != self._part:
            self._part = part
            now = len(self.timeline.events)
            self.timeline.parts.append((self._after, now, part))
        self._after = len(self.timeline.events)

    def begin(self, part: int) -> None:
        """The same, where it is known to begin here."""
        self._after = len(self.timeline.events)
        self.enter(part)

    def _read(self, tensors: list[Tensor]) -> bool:
        """Whether an operation reads a part of the network, which it then enters."""
        found = [n for t in tensors if (n := self.part_of(t)) is not None]
        for part in found:
            self.enter(part)
        return bool(found)

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._ids or size == 0:
            return
        number = len(self.timeline.cause)
        self._ids[key] = number
        self._alive[number] = size
        self._of_phase[number] = self._phase
        is_logits = t.ndim > 1 and t.shape[-1] == self._wide
        self.timeline.cause.append("logits" if is_logits else "workspace")
        self.timeline.events.append((number, size))
        self._refs[number] = weakref.ref(storage, partial(self._gone, key, number, size))

    def placed(self, arena: Arena, tensor: Tensor, lent: bool) -> None:
        """`tensor`, just made, lies in the arena."""
        self.timeline.lent = max(self.timeline.lent, arena.borrowed)
        self._kept = max(self._kept, arena.kept)
        number = self._ids.get(tensor.untyped_storage()._cdata, -1)
        if number >= 0:
            self.timeline.cause[number] = (LENT if lent else KEPT) + self.timeline.cause[number]

    def _gone(self, key: int, number: int, size: int, _: Any) -> None:
        self._ids.pop(key, None)
        self._refs.pop(number, None)
        if self._alive.pop(number, None) is not None:
            self.timeline.events.append((number, -size))

    def _turn(self, backward: bool) -> None:
        """Where a backward begins: what the forward made and is still alive was kept for it."""
        if backward:
            for number in self._alive:
                place, _, cause = self.timeline.cause[number].rpartition(":")
                if self._of_phase[number] == self._phase and cause == "workspace":
                    self.timeline.cause[number] = f"{place}:activations" if place else "activations"
        self._phase += 1
        self._in_backward = backward

    def ended(self, parameters: Iterable[Tensor]) -> Timeline:
        """The record; nothing is added to it from now on. The gradients of `parameters` are called so."""
        self._refs.clear()
        for t in parameters:
            if t.grad is not None and (number := self._ids.get(t.grad.untyped_storage()._cdata, -1)) >= 0:
                self.timeline.cause[number] = "gradients"
        self.timeline.unseen = max(0, self._kept - self.timeline.kept())
        return self.timeline.settled()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, which are values and lists of values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _described(values: Iterable[Any]) -> tuple[Any, ...]:
    """Values as a key: of tensors what a result's shape can depend on; 1, 1.0 and True are told apart."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append((value.size(), value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            found.append(_described(value))
        else:
            found.append((type(value), value))
    return tuple(found)


@cache
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


@cache
def _makes(func: Any) -> bool:
    """Whether all that an operation gives is new."""
    results = func._schema.returns
    return bool(results) and all(r.alias_info is None and str(r.type) == "Tensor" for r in results)


def traced(
    work: Callable[[], object],
    known: Iterable[Tensor],
    parameters: list[Tensor],
    wide: int,
    parts: Mapping[int, Iterable[Tensor]] | None = None,
    arena: Arena | None = None,
) -> Timeline:
    """The timeline of `work`, which computes with `known` tensors and adds to the gradients of `parameters`.

    arena  whose buffers are told apart from the heap's
    """
    tracer = Tracer(known, wide, parts)
    of_parts = [(p, part) for p in parameters if (part := tracer.part_of(p)) is not None]
    hooks = [p.register_post_accumulate_grad_hook(partial(_entered, tracer, part)) for p, part in of_parts]
    arena = Arena() if arena is None else arena
    arena.told = partial(tracer.placed, arena)
    try:
        with _cpu_attention(), _marked(tracer), tracer:
            work()
    finally:
        arena.told = None
        for hook in hooks:
            hook.remove()
    return tracer.ended(parameters)


def _entered(tracer: Tracer, part: int, _: Tensor) -> None:
    """A parameter has its gradient: nothing of its part needs to have been read for that."""
    tracer.enter(part)


@contextmanager
def _cpu_attention() -> Iterator[None]:
    """Inside, scaled_dot_product_attention on meta tensors is the CPU's blockwise kernel, as it is on real ones.

    A TorchFunctionMode would not do: it is off within `Tensor.backward`, where blocks are computed again.
    """
    real = F.scaled_dot_product_attention

    def chosen(q: Tensor, *args: Any, **how: Any) -> Tensor:
        mask = how.get("attn_mask", args[2] if len(args) > 2 else None)
        whole_rows = mask is not None and mask.requires_grad  # T5's positions, where they train
        return _blockwise(q, *args, **how) if q.is_meta and not whole_rows else real(q, *args, **how)

    with _PATCHED:
        F.scaled_dot_product_attention = chosen  # type: ignore[assignment]
        try:
            yield
        finally:
            F.scaled_dot_product_attention = real


@contextmanager
def _marked(tracer: Tracer) -> Iterator[None]:
    """Inside, fused blocks say when they begin, forward and backward: their kernels show a tracer nothing."""
    real = fuse.fused

    def marked(block: Block, x: Tensor, *args: Any, **how: Any) -> Tensor:
        part = tracer.part_of(block.attention.norm.weight)
        if part is None:
            return real(block, x, *args, **how)
        tracer.begin(part)
        y = real(block, x, *args, **how)
        if y.requires_grad:
            y.register_hook(lambda _: tracer.begin(part))
        return y

    with _PATCHED:
        fuse.fused = marked
        try:
            yield
        finally:
            fuse.fused = real


def _blockwise(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    y: Tensor = _ATTENTION(
        q, k, v, 0.0, bool(how.get("is_causal", False)), attn_mask=attn_mask, scale=how.get("scale")
    )[0]
    return y
