"""Attention over a pack of documents that cannot see each other.

A pack is one row of tokens [1, T] in which documents follow one another. Attention runs document by document, so that
no mask is needed and no work is done across documents. On a CPU a compiled kernel does that (`ops.attention`). What it
does not take (a softcap, keys in front of a document, other dtypes, a GPU) goes by PyTorch's operations: documents of
like length form a group [n, L] (short ones padded on the right), and because attention is causal, a real token never
looks at the padding behind it; what padding computes is thrown away.

The function below is registered with transformers' AttentionInterface, its public extension point, and is chosen only
while a pack is computed; everything else (generation, padded batches) keeps the model's own attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from deltaw.core.prefix import Prefix
from deltaw.errors import AdapterError
from deltaw.model.kinds import kind_of
from deltaw.ops.attention import attention, suits

NAME = "deltaw_documents"
_EXPLICIT_UP_TO = 512  # tokens; beyond this torch's blockwise attention needs less memory and is faster
_SLACK = 1.25  # a group holds documents at most this much shorter than its longest


@dataclass(frozen=True)
class Group:
    """n documents computed together, padded to `length` tokens.

    real   [m] places in [n * length] that are real tokens;  put [m] their positions in the pack
    start  where in the pack the group begins, if its tokens follow one another there as in `real`; else None
    """

    n: int
    length: int
    real: Tensor
    put: Tensor
    start: int | None


@dataclass(frozen=True)
class Documents:
    """How a pack of T tokens falls into groups of documents.

    bounds    [D + 1] where they begin, and T
    in_order  whether the groups, one after the other, are the pack
    """

    n_tokens: int
    bounds: Tensor
    groups: tuple[Group, ...]
    in_order: bool

    @classmethod
    def of(cls, bounds: Tensor, device: torch.device | None = None) -> Documents:
        """From document bounds [D + 1] on the CPU, the first 0 and the last T; for tokens on `device`.

        A pack sorted by length needs no shuffling.
        """
        starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
        sizes = lengths.tolist()
        order = sorted(range(len(sizes)), key=lambda d: (sizes[d], d))
        groups: list[Group] = []
        while order:
            longest = sizes[order[-1]]
            first = len(order) - 1
            while first and sizes[order[first - 1]] * _SLACK + 8 >= longest:
                first -= 1
            groups.append(_group(starts[order[first:]], lengths[order[first:]], longest, device))
            order = order[:first]
        groups.reverse()
        ends = [0]
        for g in groups:
            ends.append(ends[-1] + len(g.put))
        in_order = all(g.start == end for g, end in zip(groups, ends, strict=False))
        return cls(int(bounds[-1]), bounds, tuple(groups), in_order)


def _group(starts: Tensor, lengths: Tensor, longest: int, device: torch.device | None) -> Group:
    step = torch.arange(longest)
    is_real = step[None, :] < lengths[:, None]
    real = is_real.reshape(-1).nonzero().squeeze(1)
    put = (starts[:, None] + step[None, :]).reshape(-1)[real]
    first = int(put[0])
    follows = bool((put == torch.arange(first, first + len(put))).all())
    return Group(len(starts), longest, real.to(device), put.to(device), first if follows else None)


class _Spread(torch.autograd.Function):
    """Rows [m, ...] to their places among `size` rows of zeros. The places are distinct, so backward only gathers."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Gather(torch.autograd.Function):
    """The rows at distinct `places`: [size, ...] -> [m, ...]; the inverse of _Spread, and its backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.size = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (g,) = grads
        return g.new_zeros(ctx.size, *g.shape[1:]).index_copy_(0, ctx.saved_tensors[0], g), None


def spread(rows: Tensor, places: Tensor, size: int) -> Tensor:
    """Rows [m, ...] at distinct `places` among `size`, zeros elsewhere; differentiable."""
    out: Tensor = _Spread.apply(rows, places, size)
    return out


def _padded(rows: Tensor, g: Group) -> Tensor:
    """The group's rows of [T, heads, D] as [n, heads, length, D], zeros behind short documents."""
    own = _Gather.apply(rows, g.put) if g.start is None else rows[g.start : g.start + len(g.put)]
    if len(g.real) != g.n * g.length:
        own = _Spread.apply(own, g.real, g.n * g.length)
    return own.reshape(g.n, g.length, *rows.shape[1:]).transpose(1, 2)


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention with whole score rows. q [n, H, L, D], k and v [n, G, P + L, D], H a multiple of G.

    The first P keys stand before the first token. window  a token sees itself and the window - 1 positions before it;
    softcap  c * tanh(score / c)
    """
    n, heads, length, dim = q.shape
    shared, total = k.shape[1:3]
    before = total - length
    qs = q.reshape(n * shared, heads // shared * length, dim)
    scores = torch.bmm(qs * scale, k.reshape(n * shared, total, dim).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    ones = torch.ones(length, total, dtype=torch.bool, device=q.device)
    hidden = ones.triu_(before + 1) if window is None else ones.triu(before + 1) | ones.tril(before - window)
    scores = scores.view(n * shared, heads // shared, length, total).masked_fill_(hidden, float("-inf"))
    probs = scores.softmax(-1).view(n * shared, -1, total)
    return torch.bmm(probs, v.reshape(n * shared, total, v.shape[-1])).view(n, heads, length, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    length, total = q.shape[2], k.shape[2]
    window = None if window is None or window >= total else window
    if softcap is not None or window is not None or length <= _EXPLICIT_UP_TO:
        return explicit_attention(q, k, v, scale, window, softcap)
    before = total - length
    q = F.pad(q, (0, 0, before, 0)) if before else q  # is_causal counts from the first query and the first key
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y[:, :, before:] if before else y


def _attend_group(
    rows: list[Tensor], g: Group, before: list[Tensor] | None, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """The group's outputs [n, H, length, D]; `before`: keys and values [P, heads, D] in front of each document."""
    q, k, v = (_padded(t, g) for t in rows)
    if before is not None:
        k, v = (
            torch.cat([front.transpose(0, 1).expand(g.n, -1, -1, -1), own], 2)
            for front, own in zip(before, (k, v), strict=True)
        )
    return _attend(q, k, v, scale, window, softcap)


def _of_layer(front: Prefix, module: nn.Module, key: Tensor) -> list[Tensor]:
    """The keys and values [P, heads, D] in front of one layer, whose own are [1, heads, T, D].

    Raises DocumentsLost where the layer has no number, AdapterError where its keys have another shape.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None or front.keys is None or front.values is None:
        raise DocumentsLost(f"{type(module).__name__} does not say which layer it is.")
    refuse_other_shape(front.keys.shape[2:], key, layer)
    return [front.keys[layer], front.values[layer]]


def refuse_other_shape(shape: Sequence[int], key: Tensor, layer: int) -> None:
    """Raise AdapterError unless a layer's keys [rows, heads, T, D] have the (heads, D) of `shape`."""
    if (own := (key.shape[1], key.shape[3])) != tuple(shape):
        raise AdapterError(
            f"A prefix has {shape[0]} heads of {shape[1]} features, and keys of layer {layer} have {own[0]} of "
            f"{own[1]}: layers of this model differ. Use method 'prompt'."
        )


class DocumentsLost(RuntimeError):
    """A model does not hand its extra arguments down to attention, so a pack cannot be computed with it."""


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    front: Prefix | None = None,
    shifted: tuple[Documents, Documents] | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    front    keys and values that each document has before its own, in every layer
    shifted  groups to attend in instead of whole documents, for the first half of the heads and for the second
    Dropout of the base is never applied: a frozen base computes what it computes at inference.
    """
    if documents is None:
        raise DocumentsLost(f"{type(module).__name__} was not told the documents of the pack.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    before = None if front is None else _of_layer(front, module, key)
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]  # [T, heads, D]
    if shifted is None:
        return _over(documents, rows, before, scale, sliding_window, softcap).unsqueeze(0), None
    at, shared = halves(query.shape[1], key.shape[1])
    first = [rows[0][:, :at], *(t[:, :shared] if shared else t for t in rows[1:])]
    second = [rows[0][:, at:], *(t[:, shared:] for t in rows[1:])]
    of_halves = [
        _over(d, part, None, scale, sliding_window, softcap) for d, part in zip(shifted, (first, second), strict=True)
    ]
    return torch.cat(of_halves, 1).unsqueeze(0), None


def halves(n_heads: int, n_shared: int) -> tuple[int, int]:
    """(query heads, key-value heads) of the first half of the heads; the rest is the other half.

    With one key-value head for all, both halves read it: 0 says so.
    """
    if n_shared == 1:
        return n_heads // 2, 0
    first = n_shared // 2
    return first * (n_heads // n_shared), first


def _over(
    documents: Documents,
    rows: list[Tensor],
    before: list[Tensor] | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention within each of `documents`: queries, keys, values [T, heads, D] -> [T, H, D]."""
    q, k, v = rows
    if before is None and suits(q, k, v, scale, softcap):
        return attention(q, k, v, documents.bounds, scale, window)
    parts: list[Tensor] = []
    for g in documents.groups:
        y = _attend_group(rows, g, before, scale, window, softcap)
        y = y.transpose(1, 2).reshape(g.n * g.length, rows[0].shape[1], -1)
        parts.append(y if len(g.real) == len(y) else _Gather.apply(y, g.real))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    if not documents.in_order:
        out = _Spread.apply(out, torch.cat([g.put for g in documents.groups]), documents.n_tokens)
    return out


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, _no_mask)
_LOCK = threading.RLock()
_LOST: WeakSet[PreTrainedModel] = WeakSet()
_MADE_FOR_PACKS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
_OWN: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()  # the attention a model came with


def cannot_pack(net: PreTrainedModel) -> None:
    """Remember that documents cannot share a row of `net`, and give it its own attention back at once.

    A step may hold `packed_attention` open through its backward, where blocks are computed again.
    """
    _LOST.add(net)
    net.config._attn_implementation = _OWN.get(net, net.config._attn_implementation)


def packs(net: PreTrainedModel) -> bool:
    """Whether documents can share a row of `net`: only our attention may carry anything from token to token.

    Not so in encoders, whose tokens see those behind them; where a model does not call attention through transformers'
    interface (BLOOM, GPT-J, Falcon), keeps a state or a convolution over tokens (Mamba, RecurrentGemma), cuts the
    sequence into chunks or has attention sinks. A model that was found to lose the documents on the way (Nemotron) is
    in `_LOST`.
    """
    if net not in _MADE_FOR_PACKS:  # a walk over all modules, and steps ask several times
        _MADE_FOR_PACKS[net] = (
            kind_of(net) == "causal"
            and bool(getattr(net, "_supports_attention_backend", False))
            and not any(isinstance(m, nn.Conv1d) for m in net.modules())
            and getattr(net.config.get_text_config(), "attention_chunk_size", None) is None
            and not any(name.endswith("sinks") for name, _ in net.named_parameters())
        )
    return _MADE_FOR_PACKS[net] and net not in _LOST


@contextmanager
def packed_attention(net: PreTrainedModel) -> Iterator[None]:
    """Use document attention inside the block, where `net` can; the model's own attention is back after it."""
    if not packs(net):
        yield
        return
    with _LOCK:
        before = net.config._attn_implementation
        if before != NAME:
            _OWN[net] = before
        net.config._attn_implementation = NAME
        try:
            yield
        finally:
            net.config._attn_implementation = before
