"""Texts that get one of some labels: an encoder with a head, its documents padded into rows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from deltaw.core.prefix import Prefix
from deltaw.data.pack import Batch
from deltaw.errors import BaseError
from deltaw.model.front import front_arguments, refuse_unread
from deltaw.model.host import Run
from deltaw.model.kinds import fresh_tensors

if TYPE_CHECKING:
    from deltaw.model.model import Model


def label_logits(net: PreTrainedModel, front: Prefix | None, input_ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of padded rows [batch, tokens], each behind `front`: [batch, labels]."""
    given = front_arguments(net, front, input_ids, mask)
    logits: Tensor = net(**given).logits
    refuse_unread(net, given.get("past_key_values"))
    return logits


def pack_label_logits(net: PreTrainedModel, front: Prefix | None, batch: Batch, run: Run) -> Tensor:
    """Logits of a pack's documents, whose last token is the label's number and is not read: [documents, labels].

    run  is told how long the rows are, so that dropout of a document does not depend on the others
    """
    bounds = batch.bounds.tolist()
    texts = [batch.input_ids[start : end - 1] for start, end in itertools.pairwise(bounds)]
    if not _pads(net):
        run.pack = None
        return torch.cat([label_logits(net, front, text[None]) for text in texts])
    ids, mask = padded(texts, net.config.pad_token_id)
    tell_rows(run, ids.shape[1] + (0 if front is None else front.n), 1)
    return label_logits(net, front, ids, mask)


def _pads(net: PreTrainedModel) -> bool:
    """Whether rows of unlike length can share a batch: an encoder reads its mask, a decoder counts from the end."""
    config = net.config.get_text_config()
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and config.pad_token_id is not None


def padded(rows: Sequence[Tensor], pad: int | None) -> tuple[Tensor, Tensor | None]:
    """Rows of token ids as [rows, longest], `pad` behind the shorter ones, and their mask; None where all are alike."""
    longest = max(len(row) for row in rows)
    if all(len(row) == longest for row in rows):
        return torch.stack(list(rows)), None
    ids = rows[0].new_full((len(rows), longest), 0 if pad is None else pad)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return ids, mask


def documents_of(batch: Batch) -> list[Batch]:
    """Each document of a pack as a pack of its own."""
    found = []
    for start, end in itertools.pairwise(batch.bounds.tolist()):
        mine = (batch.predict_at >= start) & (batch.predict_at < end)
        found.append(
            Batch(
                input_ids=batch.input_ids[start:end],
                positions=batch.positions[start:end],
                bounds=torch.tensor([0, end - start], dtype=torch.long),
                predict_at=batch.predict_at[mine] - start,
                target_ids=batch.target_ids[mine],
            )
        )
    return found


def tell_rows(run: Run, length: int, other: int) -> None:
    """Say how long each document's row is while it is computed, on the one side and on the other."""
    if run.pack is not None:
        run.pack = tuple((number, length, other) for number, _, _ in run.pack)


@torch.no_grad()
def label_scores(model: Model, texts: Sequence[Sequence[int]], batch_size: int = 64) -> Tensor:
    """Log-probabilities of the labels for texts of token ids: [texts, labels], float32.

    Raises BaseError for a head that nothing has trained.
    """
    if fresh_tensors(model.net) and not model.run.use:
        raise BaseError("the head of this base is fresh and has learned nothing.\n  Give an adapter (--adapter).")
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    front, size = model.front(), batch_size if _pads(model.net) else 1
    scores: dict[int, Tensor] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = [torch.tensor(texts[i], dtype=torch.long, device=model.device) for i in part]
        ids, mask = padded(rows, model.net.config.pad_token_id)
        logits = label_logits(model.net, front, ids, mask).float().log_softmax(-1).cpu()
        scores |= dict(zip(part, logits, strict=True))
    return torch.stack([scores[i] for i in range(len(texts))])
