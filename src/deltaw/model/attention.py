"""Attention over a pack of documents that cannot see each other.

A pack is one row of tokens [1, T] in which documents follow one another. Attention runs document by document:
documents of like length form a group [n, L] (short ones padded on the right), and because attention is causal, a
real token never looks at the padding behind it; what padding computes is thrown away. So no mask is needed,
and no work is done across documents.

The function below is registered with transformers' AttentionInterface, its public extension point, and is chosen only
while a pack is computed; everything else (generation, padded batches) keeps the model's own attention.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "deltaw_documents"
_EXPLICIT_UP_TO = 512  # tokens; beyond this torch's blockwise attention needs less memory and is faster
_SLACK = 1.25  # a group holds documents at most this much shorter than its longest


@dataclass(frozen=True)
class Group:
    """Documents computed together.

    take   [n * L] positions in the pack, padding points at its document's first token
    real   [m] places in [n * L] that are real tokens;  put [m] their positions in the pack
    """

    n: int
    length: int
    take: Tensor
    real: Tensor
    put: Tensor


@dataclass(frozen=True)
class Documents:
    """How a pack of T tokens falls into groups of documents."""

    n_tokens: int
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, bounds: Tensor) -> Documents:
        """From document bounds [D + 1], the first 0 and the last T."""
        starts, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
        order = sorted(range(len(starts)), key=lambda d: (-int(lengths[d]), d))
        groups: list[Group] = []
        while order:
            longest = int(lengths[order[0]])
            n = 1
            while n < len(order) and int(lengths[order[n]]) * _SLACK + 8 >= longest:
                n += 1
            groups.append(_group(starts[order[:n]], lengths[order[:n]], longest))
            order = order[n:]
        return cls(int(bounds[-1]), tuple(groups))


def _group(starts: Tensor, lengths: Tensor, longest: int) -> Group:
    step = torch.arange(longest)
    is_real = step[None, :] < lengths[:, None]
    take = torch.where(is_real, starts[:, None] + step[None, :], starts[:, None]).reshape(-1)
    real = is_real.reshape(-1).nonzero().squeeze(1)
    return Group(len(starts), longest, take, real, take[real])


def explicit_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, softcap: float | None = None
) -> Tensor:
    """Causal attention with whole score rows. q [n, H, L, D], k and v [n, G, L, D], H a multiple of G.

    window  a token sees itself and the window - 1 tokens before it;  softcap  c * tanh(score / c)
    """
    n, heads, length, dim = q.shape
    shared = k.shape[1]
    qs = q.reshape(n * shared, heads // shared * length, dim)
    scores = torch.bmm(qs, k.reshape(n * shared, length, dim).transpose(1, 2)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
    hidden = ones.triu_(1) if window is None else ones.triu(1) | ones.tril(-window)
    scores = scores.view(n * shared, heads // shared, length, length).masked_fill(hidden, float("-inf"))
    probs = scores.softmax(-1).view(n * shared, -1, length)
    return torch.bmm(probs, v.reshape(n * shared, length, v.shape[-1])).view(n, heads, length, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    length = q.shape[2]
    window = None if window is None or window >= length else window
    if softcap is not None or window is not None or length <= _EXPLICIT_UP_TO:
        return explicit_attention(q, k, v, scale, window, softcap)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


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
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    Dropout of the base is never applied: a frozen base computes what it computes at inference.
    """
    if documents is None:
        raise RuntimeError("document_attention needs `documents`; call the model through deltaw's Model.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [t[0].transpose(0, 1) for t in (query, key, value)]  # [T, heads, D]
    out = None
    for g in documents.groups:
        parts = [t.index_select(0, g.take).view(g.n, g.length, *t.shape[1:]).transpose(1, 2) for t in rows]
        y = _attend(*parts, scale, sliding_window, softcap).transpose(1, 2).reshape(g.n * g.length, query.shape[1], -1)
        if out is None:
            out = y.new_empty(documents.n_tokens, *y.shape[1:])
        out = out.index_copy(0, g.put, y.index_select(0, g.real))
    assert out is not None
    return out.unsqueeze(0), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, document_attention)
AttentionMaskInterface.register(NAME, _no_mask)
_LOCK = threading.RLock()


def packs(net: PreTrainedModel) -> bool:
    """Whether documents can share a row of `net`: only our attention may carry anything from token to token.

    Not so where a model does not call attention through transformers' interface (BLOOM, GPT-J, Falcon), keeps a state
    or a convolution over tokens (Mamba, RecurrentGemma), cuts the sequence into chunks or has attention sinks.
    """
    return (
        bool(getattr(net, "_supports_attention_backend", False))
        and not any(isinstance(m, nn.Conv1d) for m in net.modules())
        and getattr(net.config.get_text_config(), "attention_chunk_size", None) is None
        and not any(name.endswith("sinks") for name, _ in net.named_parameters())
    )


@contextmanager
def packed_attention(net: PreTrainedModel) -> Iterator[None]:
    """Use document attention inside the block, where `net` can; the model's own attention is back after it."""
    if not packs(net):
        yield
        return
    with _LOCK:
        before = net.config._attn_implementation
        net.config._attn_implementation = NAME
        try:
            yield
        finally:
            net.config._attn_implementation = before
