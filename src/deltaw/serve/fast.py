"""The fast runner: a step of a Llama-like network in one native call (ops/native/step.h), adapters and all.

It takes the bases that model/fuse.py reads, in float32 or bfloat16, dense or in few bits, on a CPU. Adapters are read
once, when they come: low-rank factors of maps with one input are stacked. A step that names an adapter which replaces
tensors of the base is computed by the generic runner, on the same pages.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from deltaw.core.affine import Affine
from deltaw.core.bottleneck import Bottleneck
from deltaw.core.weight import Weight
from deltaw.formats.blockwise import BlockwiseWeight
from deltaw.formats.dense import DenseWeight
from deltaw.model.fuse import Plain, read_blocks
from deltaw.model.model import Model
from deltaw.model.resident import Resident
from deltaw.ops.arena import ask_for_huge_pages
from deltaw.ops.block import Block, Norm
from deltaw.ops.blockwise import packed
from deltaw.ops.maps import Map
from deltaw.ops.native import library
from deltaw.ops.native.pages_calls import WIDEST
from deltaw.ops.native.step_calls import LayerOf, MapOf, NetOf, Rows, Stepper, WornOf
from deltaw.serve.batch import Segment, StepBatch
from deltaw.serve.pages import Pages
from deltaw.serve.runner import GenericRunner, Runner

T = TypeVar("T")

_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary positions that do not depend on the longest sequence of the step."""


def make_runner(model: Model, pages: Pages) -> Runner:
    """A FastRunner where the base allows one, else a GenericRunner."""
    return GenericRunner(model, pages) if why_generic(model) else FastRunner(model, pages)


def why_generic(model: Model) -> str | None:
    """Why steps of this base are computed by its own code, in a few words; None where FastRunner takes them."""
    try:
        _read(model)
    except Plain as reason:
        return str(reason)
    return None


class FastRunner:
    """Steps in one native call each. Base weights are read where they lie: nothing is copied but norms and biases."""

    def __init__(self, model: Model, pages: Pages) -> None:
        """Raises model.fuse.Plain, saying why, for a base that the generic runner is for."""
        self._generic = GenericRunner(model, pages)
        for held in (*pages.keys, *pages.values):  # read in strides: small pages of the system cost a miss each
            ask_for_huge_pages(held.untyped_storage())
        self._embed = model.net.get_input_embeddings()  # the base's own: adapters that change it are not worn here
        self._body: Any = model.net.model
        self._stepper = Stepper(_net_of(model, pages))
        self._turns = _Turns(self._body.rotary_emb)
        self._worn: dict[str, WornOf] = {}
        self._plain: dict[str, str] = {}
        self._logits = torch.empty(0, self._stepper.net.head.shape[0], dtype=torch.float32)

    def ready(self, resident: Resident) -> WornOf | str:
        """The adapter as a step reads it, or why none does."""
        try:
            return _worn(self._stepper, resident)
        except Plain as reason:
            return str(reason)

    def add(self, key: str, resident: Resident, ready: object) -> None:
        """Make an adapter usable under `key`, which segments name. ready: what `ready` gave for it."""
        self._generic.add(key, resident)
        if isinstance(ready, WornOf):
            self._worn[key] = ready
        else:
            self._plain[key] = str(ready)

    def remove(self, key: str) -> None:
        """Forget it."""
        self._worn.pop(key, None)
        self._plain.pop(key, None)
        self._generic.remove(key)

    def why_generic(self, key: str) -> str | None:
        """Why steps with this adapter are computed by the model's own code, in a few words; None: they are not."""
        return self._plain.get(key)

    def run(self, batch: StepBatch) -> Tensor:
        """Write keys and values of all rows into the pages; logits of the wanted rows [n, vocab].

        They are float32 and valid until the next step: the memory is used again. Raises what GenericRunner.run does.
        """
        if library.running() is None or any(s.key in self._plain for s in batch.segments):
            return self._generic.run(batch)
        with torch.no_grad():
            hidden = self._embed(batch.ids.clamp(min=0))
            if (vectors := self._generic.vectors(batch)) is not None:
                hidden[batch.ids < 0] = vectors.to(hidden.dtype)
            cos, sin = self._turns.at(batch.positions)
        rows = Rows(
            hidden.float(), self._room(len(batch.wanted)), cos, sin, batch.bounds, batch.contexts, batch.slots,
            batch.tables, batch.wanted, self._parts(batch.segments), self._parts(batch.head),
        )  # fmt: skip
        self._stepper.run(rows)
        return rows.logits

    def _parts(self, segments: tuple[Segment, ...]) -> list[tuple[int, int, WornOf | None]]:
        return [(s.start, s.stop, None if s.key is None else self._worn[s.key]) for s in segments]

    def _room(self, n: int) -> Tensor:
        """[n, vocab] float32, the same pages step after step: new ones cost more than what is written there."""
        if len(self._logits) < n:
            self._logits = torch.empty(n, self._stepper.net.head.shape[0], dtype=torch.float32)
        return self._logits[:n]


class _Turns:
    """cos and sin of positions, from a table that grows."""

    def __init__(self, rotary: Any) -> None:
        self._rotary = rotary
        self._fixed = getattr(rotary, "rope_type", None) in _FIXED_ROPE
        self._table = (torch.empty(0, 0, dtype=torch.float32), torch.empty(0, 0, dtype=torch.float32))

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[T] -> cos and sin [T, R] float32."""
        if not self._fixed or not len(positions):
            return self._made(positions)
        top = int(positions.max()) + 1
        if top > len(self._table[0]):
            self._table = self._made(torch.arange(max(256, 2 * top)))
        return self._table[0][positions], self._table[1][positions]

    def _made(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotary(torch.empty(0, dtype=torch.float32), position_ids=positions[None])
        return cos[0].contiguous(), sin[0].contiguous()


# The base -------------------------------------------------------------------------------------------------


def _read(model: Model) -> list[Block]:
    """The blocks of a base that a step can be made of. Raises Plain."""
    if model.net.dtype not in (torch.float32, torch.bfloat16) or model.device.type != "cpu":
        raise Plain(f"the base computes in {model.net.dtype} on {model.device.type}")
    if library.running() is None:
        raise Plain("there are no compiled kernels")
    blocks = read_blocks(model.net, model.places.weights, training=False)
    first = blocks[0].attention
    for block in blocks:
        a = block.attention
        if (a.heads, a.shared, a.dim, a.scale) != (first.heads, first.shared, first.dim, first.scale):
            raise Plain("heads differ from layer to layer")
        if a.dim > WIDEST:
            raise Plain(f"a head has {a.dim} features")
        for m in (*a.inputs, a.output, *block.ffn.inputs, block.ffn.output):
            _map(m)
    _map(_head(model))
    _norm(_last(model))
    return blocks


def _net_of(model: Model, pages: Pages) -> NetOf:
    blocks = _read(model)
    a = blocks[0].attention
    layers = [_layer(b, (pages.keys[i], pages.values[i])) for i, b in enumerate(blocks)]
    return NetOf(
        layers, _norm(_last(model)), _map(_head(model)), a.heads, a.shared, a.dim, a.scale, blocks[0].ffn.act,
        model.net.dtype,
    )  # fmt: skip


def _layer(block: Block, pages: tuple[Tensor, Tensor]) -> LayerOf:
    a, f = block.attention, block.ffn
    groups = {"inputs": a.inputs, "output": (a.output,), "gates": f.inputs, "down": (f.output,)}
    heads = None
    if a.q_norm is not None and a.k_norm is not None:
        (q, eps), (k, _) = _norm(a.q_norm), _norm(a.k_norm)
        heads = (q, k, eps)
    maps = {name: tuple(_map(m) for m in of) for name, of in groups.items()}
    return LayerOf(maps, (_norm(a.norm), _norm(f.norm)), heads, pages, a.window)


def _last(model: Model) -> Norm:
    body: Any = model.net.model
    norm = body.norm
    if not type(norm).__name__.endswith("RMSNorm") or getattr(norm, "bias", None) is not None:
        raise Plain(f"the last norm is a {type(norm).__name__}")
    eps = getattr(norm, "variance_epsilon", None)
    return Norm(norm.weight, norm.eps if eps is None else eps, one_plus=type(norm).__name__ == "GemmaRMSNorm")


def _norm(norm: Norm) -> tuple[Tensor, float]:
    gain = norm.weight.detach().float()
    return (gain + 1 if norm.one_plus else gain), norm.eps


def _head(model: Model) -> Map:
    head = model.net.get_output_embeddings()
    return Map(model.places.weights["lm_head"], getattr(head, "bias", None), None)


def _map(m: Map) -> MapOf:
    weight: Weight = m.weight
    if isinstance(weight, BlockwiseWeight):
        blocks = weight.blocks
        return MapOf(packed(blocks), m.bias, blocks)
    if isinstance(weight, DenseWeight) and not weight.transposed and weight.stored.is_contiguous():
        return MapOf(weight.stored, m.bias)
    raise Plain(f"a matrix is a {type(weight).__name__} in another layout")


# Adapters ---------------------------------------------------------------------------------------------------


def _worn(stepper: Stepper, resident: Resident) -> WornOf:
    """The adapter as a step reads it. Raises Plain for one that replaces tensors or changes other places."""
    name = resident.made.spec.name
    if resident.made.swaps or resident.made.rows:
        raise Plain(f"{name} replaces tensors of the base")
    left = dict(resident.forms)
    forms, nets = [], []
    for i, layer in enumerate(stepper.net.layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        nets.append((_taken(left, attention + "o_proj", Bottleneck), _taken(left, mlp + "down_proj", Bottleneck)))
        inputs = ("qkv_proj",) if len(layer.maps["inputs"]) == 1 else ("q_proj", "k_proj", "v_proj")
        gates = ("gate_up_proj",) if len(layer.maps["gates"]) == 1 else ("gate_proj", "up_proj")
        forms.append(
            {
                "inputs": tuple(_taken(left, attention + key, Affine) for key in inputs),
                "output": (_taken(left, attention + "o_proj", Affine),),
                "gates": tuple(_taken(left, mlp + key, Affine) for key in gates),
                "down": (_taken(left, mlp + "down_proj", Affine),),
            }
        )
    head = _taken(left, "lm_head", Affine)
    if left:
        raise Plain(f"{name} changes {next(iter(left))}")
    return stepper.worn(forms, nets, head)


def _taken(forms: dict[str, Any], name: str, kind: type[T]) -> T | None:
    """The form at a place if it is of that kind, taken out of `forms`."""
    return forms.pop(name) if isinstance(forms.get(name), kind) else None
