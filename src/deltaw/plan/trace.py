"""Run the real computation on the meta device and see what it would keep in memory, moment by moment.

Nothing is computed and nothing is allocated: tensors have shapes only. But every operation of the network, of the
method, of the loss and of their backwards is called as in a real step, so any architecture and method is covered, and
the plan cannot drift from the code.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from deltaw.plan.heap import Heap

_ITEM = torch.ops.aten._local_scalar_dense.default
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_PATCHED = threading.RLock()
CAUSES = ("activations", "logits", "workspace", "gradients")


@dataclass
class Timeline:
    """What was allocated and freed, in order.

    events    (storage, bytes), bytes negative where it is freed
    cause     of each storage: one of CAUSES
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    cause: dict[int, str] = field(default_factory=dict)

    def peak(self) -> dict[str, int]:
        """Bytes by cause at the moment when most is alive."""
        now = most = at = 0
        for i, (_, size) in enumerate(self.events):
            now += size
            if now > most:
                most, at = now, i
        found = dict.fromkeys(CAUSES, 0)
        for number, size in self.events[: at + 1] if most else ():
            found[self.cause[number]] += size
        return found

    def held(self, repeats: int = 3) -> int:
        """The most that glibc's heap holds when the work is done `repeats` times, one after the other."""
        heap = Heap()
        for _ in range(repeats):
            left = set()
            for number, size in self.events:
                if size > 0:
                    heap.allocate(number, size)
                    left.add(number)
                elif number in left:
                    heap.free(number)
                    left.discard(number)
            for number in left:  # gradients, which go with the step
                heap.free(number)
        return heap.peak


class Tracer(TorchDispatchMode):
    """Inside, operations on meta tensors run and are recorded; `timeline` is the record.

    known   tensors that are there already and are not counted
    wide    the vocabulary: a tensor with this many columns is counted as logits
    """

    def __init__(self, known: Iterable[Tensor] = (), wide: int | None = None) -> None:
        super().__init__()
        self.timeline = Timeline()
        self._wide = wide
        self._ids: dict[int, int] = {t.untyped_storage()._cdata: -1 for t in known}
        self._alive: dict[int, int] = {}
        self._phase = 0
        self._of_phase: dict[int, int] = {}
        self._in_backward = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in tensors):
            if func is _ITEM:
                return 1.0
            if any(not t.is_meta for t in tensors):
                args, kwargs = tree_map_only(
                    Tensor, lambda t: t if t.is_meta else torch.empty_like(t, device="meta"), (args, kwargs)
                )
            kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        backward = torch._C._current_graph_task_id() != -1
        if backward != self._in_backward:
            self._turn(backward)
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.is_meta:
                self._see(t)
        return out

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._ids:
            return
        number, size = len(self.timeline.cause), storage.nbytes()
        self._ids[key] = number
        self._alive[number] = size
        self._of_phase[number] = self._phase
        is_logits = t.ndim > 1 and t.shape[-1] == self._wide
        self.timeline.cause[number] = "logits" if is_logits else "workspace"
        self.timeline.events.append((number, size))
        weakref.finalize(storage, self._gone, key, number, size).atexit = False

    def _gone(self, key: int, number: int, size: int) -> None:
        self._ids.pop(key, None)
        if self._alive.pop(number, None) is not None:
            self.timeline.events.append((number, -size))

    def _turn(self, backward: bool) -> None:
        """Where a backward begins: what the forward made and is still alive was kept for it."""
        if backward:
            for number in self._alive:
                if self._of_phase[number] == self._phase and self.timeline.cause[number] == "workspace":
                    self.timeline.cause[number] = "activations"
        self._phase += 1
        self._in_backward = backward

    def call_gradients(self, tensors: Iterable[Tensor]) -> None:
        """Count the gradients of `tensors` as such."""
        for t in tensors:
            if t.grad is not None and (number := self._ids.get(t.grad.untyped_storage()._cdata, -1)) >= 0:
                self.timeline.cause[number] = "gradients"


def traced(work: Callable[[], object], known: Iterable[Tensor], parameters: list[Tensor], wide: int) -> Timeline:
    """The timeline of `work`, which computes with `known` tensors and adds to the gradients of `parameters`."""
    tracer = Tracer(known, wide)
    with _cpu_attention(), tracer:
        work()
    tracer.call_gradients(parameters)
    return tracer.timeline


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


def _blockwise(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
    y: Tensor = _ATTENTION(
        q, k, v, 0.0, bool(how.get("is_causal", False)), attn_mask=attn_mask, scale=how.get("scale")
    )[0]
    return y
