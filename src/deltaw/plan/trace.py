"""Run the real computation on the meta device and see what it would keep in memory, moment by moment.

Nothing is computed and nothing is allocated: tensors have shapes only. But every operation of the network, of the
method, of the loss and of their backwards is called as in a real step, so any architecture and method is covered, and
the plan cannot drift from the code.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from deltaw.model import fuse
from deltaw.ops.arena import Arena
from deltaw.ops.block import Block
from deltaw.ops.rounds import watched
from deltaw.plan.made import made, tensors, what
from deltaw.plan.timeline import ADDED, KEPT, LENT, Timeline

_ITEM = torch.ops.aten._local_scalar_dense.default
_ADD = torch.ops.aten.add_.Tensor
_RAND, _DRAWN = torch.ops.aten.rand.default, torch.ops.aten.rand.generator
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_PATCHED = threading.RLock()
_LISTS = (list, tuple)


class Tracer(TorchDispatchMode):
    """Inside, operations on meta tensors run and are recorded; `ended` gives the record.

    known   tensors that are there already and are not counted
    wide    the vocabulary: a tensor with this many columns is counted as logits
    maps    what the base's linear maps hold
    parts   a part's number -> its tensors; the record's `parts` say when operations go from one part to another

    What an operation makes is the same for the same shapes: it is worked out once in a process, and what only writes
    into tensors that are there is not worked out at all.
    """

    def __init__(
        self,
        known: Iterable[Tensor] = (),
        wide: int | None = None,
        parts: Mapping[int, Iterable[Tensor]] | None = None,
        maps: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self._events: list[tuple[int, int]] = []
        self._cause: list[str] = []
        self._parts: list[tuple[int, int, int]] = []
        self._wide = wide
        self._ids: dict[int, int] = {t.untyped_storage()._cdata: -1 for t in known}
        self._part_of = {t.untyped_storage()._cdata: n for n, of_one in (parts or {}).items() for t in of_one}
        self._maps = {t.untyped_storage()._cdata for t in maps}
        self._reads = False
        self._part: int | None = None
        self._after = 0
        self._arena: Arena | None = None
        self._refs: dict[int, weakref.ref[Any]] = {}  # by storage, as _ids
        self._alive: dict[int, int] = {}
        self._added: list[tuple[int, int]] = []
        self._held = 0
        self._first: dict[int, tuple[int, int]] = {}  # a held gradient -> the storage that it first was, and its bytes
        self._phase = self._kept = self._lent = 0
        self._of_phase: dict[int, int] = {}
        self._in_backward = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and being skipped costs every operation a wrapper

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = tensors((*args, *kwargs.values()) if kwargs else args)
        on_meta = [t for t in there if t.is_meta]
        if on_meta:
            if func is _ITEM:
                return 1.0
            if len(on_meta) < len(there):
                args, kwargs = tree_map_only(
                    Tensor, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"), (args, kwargs)
                )
            if "generator" in kwargs:
                kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        elif func is _DRAWN:  # what dropout's mask is made of: nobody needs the numbers
            func, kwargs = _RAND, {k: v for k, v in kwargs.items() if k != "generator"} | {"device": "meta"}
        in_part = False
        if self._part_of:
            for t in on_meta:
                if (part := self._part_of.get(t.untyped_storage()._cdata)) is not None:
                    self.enter(part)
                    in_part = True
        backward = self._turned()
        _, written, makes = what(func)
        if not self._reads and (makes or written is not None):
            self._reads = any(self._looked_into(t) for t in on_meta)
        if not on_meta:
            out = func(*args, **kwargs)
        elif written is not None:
            out = args[0] if written == 0 else kwargs["out"]
        else:
            out = made(func, args, kwargs, self._ids) if makes else func(*args, **kwargs)
        if isinstance(out, Tensor):
            if out.is_meta:
                self._see(out)
        elif isinstance(out, _LISTS):
            for t in tensors(out):
                if t.is_meta:
                    self._see(t)
        if in_part:
            self._after = len(self._events)
        if func is _ADD and backward:
            self._add(*args[:2])
        return out

    def hold(self, parameters: Iterable[Tensor]) -> None:
        """Before all else: let every parameter have a gradient, as if what is done now had been done before."""
        for p in parameters:
            p.grad = torch.empty_like(p)
        self._held = len(self._cause)

    def _add(self, to: Tensor, value: Any) -> None:
        """`value` is added to a gradient. Where there was none, autograd kept it, or a copy if it lies otherwise."""
        at, number = self._number(to), self._number(value)
        self._added.append((at, number))
        if 0 <= at < self._held:
            same = all(a == b for a, b, n in zip(to.stride(), value.stride(), to.shape, strict=True) if n > 1)
            storage = (number, value) if same else (-2 - at, to)
            self._first.setdefault(at, (storage[0], storage[1].untyped_storage().nbytes()))

    def _looked_into(self, t: Tensor) -> bool:
        key = t.untyped_storage()._cdata
        return key in self._maps or (key not in self._ids and t.numel() > 0)

    def _number(self, value: Any) -> int:
        """Of a tensor's storage; -1 where it is not counted."""
        return self._ids.get(value.untyped_storage()._cdata, -1) if isinstance(value, Tensor) else -1

    def part_of(self, tensor: Tensor) -> int | None:
        """The part of the network that a tensor belongs to."""
        return self._part_of.get(tensor.untyped_storage()._cdata) if self._part_of else None

    def enter(self, part: int) -> None:
        """From now on this part computes."""
        if part != self._part:
            self._part = part
            now = len(self._events)
            self._parts.append((self._after, now, part))
        self._after = len(self._events)

    def begin(self, part: int) -> None:
        """The same, where it is known to begin here."""
        self._after = len(self._events)
        self.enter(part)

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._ids or (size := storage.nbytes()) == 0:
            return
        number = len(self._cause)
        self._ids[key] = number
        self._alive[number] = size
        self._of_phase[number] = self._phase
        is_logits = t.ndim > 1 and t.shape[-1] == self._wide
        self._cause.append("logits" if is_logits else "workspace")
        self._events.append((number, size))
        self._refs[key] = weakref.ref(storage, partial(self._gone, key, size))

    def placed(self, arena: Arena, tensor: Tensor, lent: bool) -> None:
        """`tensor`, just made, lies in the arena."""
        self._turned()
        self._see(tensor)
        self._arena = arena
        self._lent = max(self._lent, arena.borrowed)
        self._kept = max(self._kept, arena.kept)
        if (number := self._number(tensor)) >= 0:
            self._cause[number] = (LENT if lent else KEPT) + self._cause[number]

    def _gone(self, key: int, size: int, _: Any) -> None:
        number = self._ids.pop(key)
        del self._refs[key]
        del self._alive[number]
        self._events.append((number, -size))

    def mark(self) -> tuple[int, ...]:
        """As `ops.rounds.Watcher`."""
        arena = self._arena
        stacks = (0, 0) if arena is None else (arena.kept, arena.borrowed)
        return len(self._events), len(self._cause), self._after, len(self._parts), self._phase, *stacks

    def again(self, marks: list[tuple[int, ...]]) -> bool:
        """As `ops.rounds.Watcher`: a round stands for others if it did what the one before did, to what that left.

        Then no more is alive in any of them, and nothing is noted.
        """
        if marks[-1] == marks[-2]:
            return True  # nothing was allocated or freed
        if len(marks) < 3 or not marks[-3][3:] == marks[-2][3:] == marks[-1][3:]:
            return False
        (first, made, read, *_), (second, then, read_2, *_), (end, now, read_3, *_) = marks[-3:]
        shift = now - then
        one, two = self._events[first:second], self._events[second:end]
        causes = self._cause[then:now]
        if [(n + shift, size) for n, size in one] != two or self._cause[made:then] != causes:
            return False
        if any(n in self._alive for n in range(made, then)) or any(c.startswith(KEPT) for c in causes):
            return False  # what they keep adds up
        return read_3 - read_2 == read_2 - read

    def _turned(self) -> bool:
        """Whether a backward is under way. Where it begins, what the forward made and is alive was kept for it."""
        backward: bool = torch._C._current_graph_task_id() != -1
        if backward == self._in_backward:
            return backward
        if backward:
            for number in self._alive:
                place, _, cause = self._cause[number].rpartition(":")
                if self._of_phase[number] == self._phase and cause == "workspace":
                    self._cause[number] = f"{place}:activations" if place else "activations"
        self._phase += 1
        self._in_backward = backward
        return backward

    def ended(self, parameters: Iterable[Tensor]) -> Timeline:
        """The record; nothing is added to it from now on. The gradients of `parameters` are called so."""
        self._refs.clear()
        for t in parameters:
            if t.grad is not None and (number := self._number(t.grad)) >= 0:
                self._cause[number] = "gradients"
        for to, number in self._added:
            if to >= 0 <= number and self._cause[to] == "gradients" and self._cause[number] == "workspace":
                self._cause[number] = ADDED + "workspace"
        line = Timeline.of(self._events, self._cause, self._parts, lent=self._lent, reads=self._reads)
        line.unseen = max(0, self._kept - line.kept())
        there = {storage: at for at, (storage, _) in sorted(self._first.items(), reverse=True) if storage != -1}
        return line.begun(self._held, {at: self._first[at][1] for at in there.values()}).settled()


def traced(
    work: Callable[[], object],
    known: Iterable[Tensor],
    parameters: list[Tensor],
    wide: int,
    parts: Mapping[int, Iterable[Tensor]] | None = None,
    arena: Arena | None = None,
    whole: bool = False,
    twice: bool = False,
    maps: Iterable[Tensor] = (),
) -> Timeline:
    """The timeline of `work`, which computes with `known` tensors and adds to the gradients of `parameters`.

    arena  whose buffers are told apart from the others
    whole  run every round of every loop. Else rounds that do the same (ops/rounds.py) are run a few times
    twice  it is done twice. The second time takes what the first took, and the gradients beside: it alone is run
    """
    tracer = Tracer(known, wide, parts, maps)
    of_parts = [(p, part) for p in parameters if (part := tracer.part_of(p)) is not None]
    hooks = [p.register_post_accumulate_grad_hook(partial(_entered, tracer, part)) for p, part in of_parts]
    arena = Arena() if arena is None else arena
    arena.told = partial(tracer.placed, arena)
    try:
        with _cpu_attention(), _marked(tracer), nullcontext() if whole else watched(tracer), tracer:
            if twice:
                tracer.hold(parameters)
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
