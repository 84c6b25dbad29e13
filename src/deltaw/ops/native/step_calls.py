"""Typed calls of step.h: a Llama-like network as the compiled step reads it, and one step. Shapes are checked here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.errors import ShapeError
from deltaw.ops.arena import on_huge_pages
from deltaw.ops.native.calls import DTYPES, Packed, reads_pairs
from deltaw.ops.native.elementwise_calls import ACTS
from deltaw.ops.native.library import running
from deltaw.ops.native.pages_calls import PAGE, check_places, fields

GROUPS = ("inputs", "output", "gates", "down")
"""A layer's maps by what they read: the normed rows, attention, the normed rows, the gated rows."""

PANEL = 16
"""Outputs of an adapter's B that lie together, rank by rank: native.h's PANEL."""

NET_ACTS = {"relu": 0, "gelu": 1, "silu": 2, "tanh": 3}

_pointer, _i64 = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = fields(pointers="dense packed bias", sizes="rows cols")


class _Change(ctypes.Structure):
    _fields_ = fields(pointers="b out_gain in_gain bias", sizes="rank")


class _Changes(ctypes.Structure):
    _fields_ = [("a", _pointer), ("rank", _i64), ("of", _Change * 3)]


class _Net(ctypes.Structure):
    _fields_ = fields(pointers="down up down_bias up_bias", sizes="m", floats="scale", ints="act parallel")


class _Worn(ctypes.Structure):
    _fields_ = [("groups", _Changes * 4), ("nets", _Net * 2)]


class _Segment(ctypes.Structure):
    _fields_ = fields(pointers="worn head", sizes="first last")


class _Layer(ctypes.Structure):
    _fields_ = [
        ("inputs", _Linear * 3), ("output", _Linear), ("gates", _Linear * 2), ("down", _Linear),
        *fields(
            pointers="norm gate_norm q_norm k_norm keys values", sizes="n_inputs n_gates window",
            floats="eps gate_eps head_eps", ints="unused",
        ),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *fields(
            pointers="layers segments head_segments bounds contexts slots wanted tables cos sin hidden logits room"
        ),
        ("head", _Linear), ("norm", _pointer),
        *fields(
            sizes="n_layers n_segments n_head_segments n n_wanted sequences width d f heads shared dim turned",
            floats="eps scale", ints="dtype act",
        ),
    ]  # fmt: skip


@dataclass(frozen=True)
class MapOf:
    """A frozen matrix [out, in], dense or in few bits (with what its pointers need alive), and its bias or None."""

    weight: Tensor | Packed
    bias: Tensor | None
    alive: object = None

    @property
    def shape(self) -> tuple[int, int]:
        w = self.weight
        return (w.rows, w.cols) if isinstance(w, Packed) else (w.shape[0], w.shape[1])


@dataclass(frozen=True)
class LayerOf:
    """One layer: maps by GROUPS, gains of its norms (float32) with their eps, its pages, and what a token sees."""

    maps: dict[str, tuple[MapOf, ...]]
    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    head_norms: tuple[Tensor, Tensor, float] | None
    pages: tuple[Tensor, Tensor]
    window: int | None


@dataclass(frozen=True)
class NetOf:
    """A network: its layers, its last norm and its head, and what all layers share."""

    layers: Sequence[LayerOf]
    norm: tuple[Tensor, float]
    head: MapOf
    heads: int
    shared: int
    dim: int
    scale: float
    act: str
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.layers[0].maps["output"][0].shape[0]

    @property
    def inner(self) -> int:
        return self.layers[0].maps["down"][0].shape[1]


@dataclass(frozen=True)
class WornOf:
    """An adapter as a step reads it; the addresses are valid while this lives."""

    layers: Any
    head: Any
    alive: Tensor


@dataclass
class Rows:
    """One step's rows, as serve/batch.py has them; segments and head: (first, last, WornOf or None).

    hidden [T, d] float32 is overwritten, logits [n_wanted, vocab] float32 filled; cos, sin [T, turned] float32.
    """

    hidden: Tensor
    logits: Tensor
    cos: Tensor
    sin: Tensor
    bounds: Tensor
    contexts: Tensor
    slots: Tensor
    tables: Tensor
    wanted: Tensor
    segments: Sequence[tuple[int, int, WornOf | None]]
    head: Sequence[tuple[int, int, WornOf | None]]


class Stepper:
    """A network ready to take steps. Not for two threads at once: its memory is one step's."""

    def __init__(self, net: NetOf) -> None:
        """Raises ShapeError for a network whose parts do not fit."""
        self.net = net
        self._alive: list[object] = [net]
        self._layers = (_Layer * len(net.layers))(*(self._layer(layer) for layer in net.layers))
        self._room = torch.empty(0, dtype=torch.uint8)
        self._step = _Step(
            layers=ctypes.addressof(self._layers), n_layers=len(net.layers), head=self._linear(net.head),
            norm=self._gain(net.norm[0], net.width), eps=net.norm[1], d=net.width, f=net.inner, heads=net.heads,
            shared=net.shared, dim=net.dim, scale=net.scale, dtype=DTYPES[net.dtype], act=ACTS[net.act],
        )  # fmt: skip

    def run(self, rows: Rows) -> None:
        """Write the rows' keys and values, and the logits of the wanted ones. Raises ShapeError, MemoryError."""
        found = running()
        assert found is not None, "callers ask running() first"
        library, at = found
        n, n_wanted = len(rows.slots), len(rows.wanted)
        self._check(rows, n)
        segments, head = _segments(rows.segments, n), _segments(rows.head, n_wanted)
        step = self._step
        for name in ("bounds", "contexts", "slots", "wanted", "tables", "cos", "sin", "hidden", "logits"):
            setattr(step, name, getattr(rows, name).data_ptr())
        step.segments, step.n_segments = ctypes.addressof(segments), len(segments)
        step.head_segments, step.n_head_segments = ctypes.addressof(head), len(head)
        step.n, step.n_wanted, step.sequences = n, n_wanted, len(rows.contexts)
        step.width, step.turned = rows.tables.shape[1], rows.cos.shape[1]
        threads = torch.get_num_threads()
        library.deltaw_step_room.restype = _i64
        size = library.deltaw_step_room(at, threads, ctypes.byref(step))
        if self._room.numel() < size + 64:
            self._room = torch.empty(size + size // 4 + 64, dtype=torch.uint8)
        step.room = -(-self._room.data_ptr() // 64) * 64
        done = library.deltaw_step(at, threads, ctypes.byref(step))
        if done == 2:
            raise MemoryError("deltaw_step found no memory")
        assert done == 0

    # What the kernels trust -------------------------------------------------------------------------

    def _check(self, rows: Rows, n: int) -> None:
        net, s = self.net, len(rows.contexts)
        turned = rows.cos.shape[-1]
        wanted = [
            (rows.hidden, (n, net.width), torch.float32), (rows.cos, (n, turned), torch.float32),
            (rows.sin, (n, turned), torch.float32), (rows.bounds, (s + 1,), torch.int64),
            (rows.contexts, (s,), torch.int64), (rows.slots, (n,), torch.int64),
            (rows.tables, (s, rows.tables.shape[-1]), torch.int32), (rows.wanted, (len(rows.wanted),), torch.int64),
            (rows.logits, (len(rows.wanted), net.head.shape[0]), torch.float32),
        ]  # fmt: skip
        for t, shape, dtype in wanted:
            if t.shape != shape or t.dtype != dtype or not t.is_contiguous() or not t.is_cpu:
                raise ShapeError(f"found {list(t.shape)} {t.dtype}, a step needs {list(shape)} {dtype}, contiguous.")
        if turned > net.dim or turned % 2:
            raise ShapeError(f"{turned} of {net.dim} features of a head cannot be turned.")
        n_pages = net.layers[0].pages[0].shape[0]
        check_places(rows.slots, rows.bounds, rows.contexts, rows.tables, n_pages)
        if len(rows.wanted) and not 0 <= int(rows.wanted.min()) <= int(rows.wanted.max()) < n:
            raise ShapeError(f"wanted rows do not lie among {n}.")

    def _layer(self, layer: LayerOf) -> _Layer:
        net = self.net
        heads = (net.heads + 2 * net.shared) * net.dim
        sizes = {"inputs": (heads, net.width), "output": (net.width, net.heads * net.dim)}
        sizes |= {"gates": (2 * net.inner, net.width), "down": (net.width, net.inner)}
        for group, (wide, cols) in sizes.items():
            found = [m.shape for m in layer.maps[group]]
            if sum(o for o, _ in found) != wide or any(c != cols for _, c in found) or len(found) not in (1, 2, 3):
                raise ShapeError(f"{group} of {found} do not make {wide} of {cols} features.")
        for held in layer.pages:
            if held.shape[1:] != (PAGE, net.shared, net.dim) or held.dtype != net.dtype or not held.is_contiguous():
                raise ShapeError(f"pages of {list(held.shape)} {held.dtype} are not those of this network.")
        (norm, eps), (gate_norm, gate_eps) = layer.norms
        made = _Layer(
            output=self._linear(layer.maps["output"][0]), down=self._linear(layer.maps["down"][0]),
            norm=self._gain(norm, net.width), gate_norm=self._gain(gate_norm, net.width), eps=eps, gate_eps=gate_eps,
            keys=layer.pages[0].data_ptr(), values=layer.pages[1].data_ptr(), n_inputs=len(layer.maps["inputs"]),
            n_gates=len(layer.maps["gates"]), window=2**62 if layer.window is None else layer.window,
        )  # fmt: skip
        for name in ("inputs", "gates"):
            for i, m in enumerate(layer.maps[name]):
                getattr(made, name)[i] = self._linear(m)
        if layer.head_norms is not None:
            q, k, made.head_eps = layer.head_norms
            made.q_norm, made.k_norm = self._gain(q, net.dim), self._gain(k, net.dim)
        return made

    def _linear(self, m: MapOf) -> _Linear:
        rows, cols = m.shape
        out = _Linear(rows=rows, cols=cols, bias=None if m.bias is None else self._gain(m.bias, rows))
        self._alive.append(m)
        if isinstance(m.weight, Packed):
            out.packed = ctypes.addressof(m.weight)
        else:
            out.dense = _address(m.weight, (rows, cols), self.net.dtype)
        return out

    def _gain(self, t: Tensor, n: int) -> int:
        kept = t.detach().float().contiguous()
        self._alive.append(kept)
        return _address(kept, (n,), torch.float32)

    # Adapters ----------------------------------------------------------------------------------------

    def worn(
        self,
        forms: Sequence[dict[str, tuple[Affine | None, ...]]],
        nets: Sequence[tuple[Bottleneck | None, Bottleneck | None]],
        head: Affine | None,
    ) -> WornOf:
        """An adapter: for each layer its forms by GROUPS, map by map, and its networks behind the layer's halves."""
        shelf = _Shelf()
        layers = (_Worn * len(self.net.layers))()
        for out, of_layer, of_halves, layer in zip(layers, forms, nets, self.net.layers, strict=True):
            for g, group in enumerate(GROUPS):
                self._changes(out.groups[g], of_layer[group], layer.maps[group], shelf)
            for half, form in enumerate(of_halves):
                if form is not None:
                    self._net(out.nets[half], form, shelf)
        of_head = None if head is None else _Changes()
        if head is not None:
            self._changes(of_head, (head,), (self.net.head,), shelf)
        return WornOf(layers, of_head, shelf.fill())

    def _changes(self, out: Any, forms: Sequence[Affine | None], maps: Sequence[MapOf], shelf: _Shelf) -> None:
        dtype, cols = self.net.dtype, maps[0].shape[1]
        factors = [f.A for f in forms if f is not None and f.A is not None]
        if factors:
            a = torch.cat(factors)
            if a.shape[1] != cols:
                raise ShapeError(f"found A of {list(a.shape)} for {cols} features.")
            out.rank = len(a)
            a = _turned(a) if dtype == torch.bfloat16 and reads_pairs() else a
            shelf.put(out, "a", a, a.shape, dtype)
        for i, (form, m) in enumerate(zip(forms, maps, strict=True)):
            if form is None:
                continue
            wide = m.shape[0]
            if form.B is not None:
                out.of[i].rank = rank = form.B.shape[1]
                unit = 2 if dtype == torch.bfloat16 and reads_pairs() else 1
                panels = torch.zeros(-(-wide // PANEL), PANEL, -(-rank // unit), unit, dtype=torch.float32)
                panels.view(panels.shape[0] * PANEL, -1)[:wide, :rank] = form.B.detach().float() * form.scale
                panels = panels.transpose(1, 2)
                shelf.put(out.of[i], "b", panels, panels.shape, dtype)
            for name, size in (("out_gain", wide), ("in_gain", m.shape[1]), ("bias", wide)):
                if (value := getattr(form, name)) is not None:
                    shelf.put(out.of[i], name, value, (size,), torch.float32)

    def _net(self, out: Any, form: Bottleneck, shelf: _Shelf) -> None:
        m, d = form.down.shape[0], self.net.width
        out.m, out.scale, out.act, out.parallel = m, form.scale, NET_ACTS[form.act], form.parallel
        parts = {
            "down": ((m, d), self.net.dtype), "up": ((d, m), self.net.dtype),
            "down_bias": ((m,), torch.float32), "up_bias": ((d,), torch.float32),
        }  # fmt: skip
        for name, (shape, dtype) in parts.items():
            shelf.put(out, name, getattr(form, name), shape, dtype)


class _Shelf:
    """Tensors of an adapter, in the order in which a step reads them, side by side: one stream of large pages."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, str, Tensor, torch.dtype]] = []

    def put(self, out: Any, name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Let `out.name` be the address of a copy of t in `dtype`, once the shelf is filled."""
        if t.shape != shape or not t.is_cpu:
            raise ShapeError(f"found {list(t.shape)} on {t.device}, a step needs {list(shape)} on the CPU.")
        self._held.append((out, name, t.detach(), dtype))

    def fill(self) -> Tensor:
        """The memory they lie in."""
        starts = [0]
        for _, _, t, dtype in self._held:
            starts.append(starts[-1] + -(-t.numel() * dtype.itemsize // 64) * 64)
        memory = on_huge_pages(starts[-1] + 64)
        first = -memory.data_ptr() % 64
        for (out, name, t, dtype), start in zip(self._held, starts, strict=False):
            place = memory[first + start : first + start + t.numel() * dtype.itemsize]
            place.view(dtype).view(t.shape).copy_(t)
            setattr(out, name, place.data_ptr())
        return memory


def _turned(a: Tensor) -> Tensor:
    """A [rank, cols] in panels of PANEL ranks and fewer, as native.h's Changes has them: [values]."""
    cols = -(-a.shape[1] // 32) * 32
    parts = []
    for first in range(0, len(a), PANEL):
        ranks = a[first : first + PANEL].detach()
        wide = 1 << (len(ranks) - 1).bit_length()
        padded = ranks.new_zeros(wide, cols)
        padded[: len(ranks), : a.shape[1]] = ranks
        parts.append(padded.view(wide, -1, PANEL // wide, 2).transpose(0, 1).flatten())
    return torch.cat(parts)


def _segments(parts: Sequence[tuple[int, int, WornOf | None]], n: int) -> Any:
    if [p[0] for p in parts] + [n] != [0] + [p[1] for p in parts]:
        raise ShapeError(f"segments {[p[:2] for p in parts]} do not cover {n} rows.")
    out = (_Segment * len(parts))()
    for segment, (first, last, worn) in zip(out, parts, strict=True):
        segment.first, segment.last = first, last
        if worn is not None:
            segment.worn = ctypes.addressof(worn.layers)
            segment.head = None if worn.head is None else ctypes.addressof(worn.head)
    return out


def _address(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    if t.shape != shape or t.dtype != dtype or not t.is_contiguous() or not t.is_cpu:
        raise ShapeError(f"found {list(t.shape)} {t.dtype}, a step needs {list(shape)} {dtype}, contiguous.")
    return t.data_ptr()
