"""What a model computes: logits of rows and of packs, and the loss of a pack."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from deltaw.core.prefix import Prefix
from deltaw.data.pack import Batch
from deltaw.data.task import Kind
from deltaw.errors import AdapterError, ShapeError, SpecError
from deltaw.model.attachment import Attachment
from deltaw.model.attention import DocumentsLost, cannot_pack, packed_attention, packs
from deltaw.model.classify import label_logits, pack_label_logits
from deltaw.model.fuse import Plain, fused_hidden, wears, why_plain
from deltaw.model.host import Run
from deltaw.model.kinds import NAMES
from deltaw.model.limits import refuse_unknown
from deltaw.model.places import Places
from deltaw.model.recompute import recomputed_blocks
from deltaw.model.seq2seq import answer_logits, pack_answer_logits
from deltaw.model.shift import shifted_documents
from deltaw.model.virtual import front_of, one_by_one, pack_arguments, padded_logits
from deltaw.ops.arena import Arena
from deltaw.ops.head import head_loss
from deltaw.ops.loss import summed_cross_entropy


class Computes:
    """The half of `Model` that computes; attaching and using adapters is the other."""

    net: PreTrainedModel
    kind: Kind
    run: Run
    places: Places
    adapters: dict[str, Attachment]
    arena: Arena

    @property
    def device(self) -> torch.device:
        """Where the base's weights are, and where everything is computed."""
        device: torch.device = self.net.device
        return device

    def front(self) -> Prefix | None:
        """The vectors in front of the sequence that the adapter in use has, in the base's dtype; None without."""
        return front_of((self.adapters[name] for name in self.run.use), self.places, self.net, self.run.seed)

    @property
    def n_before(self) -> int:
        """The positions that virtual tokens take in front of each document."""
        with torch.no_grad():
            front = self.front()
        return 0 if front is None else front.n

    def logits(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, decoder_input_ids: Tensor | None = None
    ) -> Tensor:
        """Logits of padded rows. input_ids [batch, tokens] -> [batch, tokens, vocab].

        A classifier gives [batch, labels]; an encoder-decoder [batch, m, vocab] for decoder_input_ids [batch, m]. Ids
        may be on any device; logits are on the base's. Pad on the right: behind padding on the left, learned positions
        and virtual tokens stand where transformers and PEFT put them, away from the row.

        Raises ShapeError for what is no tensor of ids [batch, tokens], DataError for a token without a vector.
        """
        _refuse_other_than_rows(input_ids, "input_ids")
        self._refuse_unknown(input_ids, "input_ids")
        input_ids = input_ids.to(self.device)
        attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        if self.kind == "classify":
            return label_logits(self.net, self.front(), input_ids, attention_mask)
        if self.kind == "seq2seq":
            if decoder_input_ids is None:
                raise SpecError("An encoder-decoder computes logits of an answer: pass decoder_input_ids too.")
            _refuse_other_than_rows(decoder_input_ids, "decoder_input_ids")
            self._refuse_unknown(decoder_input_ids, "decoder_input_ids")
            return answer_logits(self.net, self.front(), input_ids, decoder_input_ids.to(self.device), attention_mask)
        return padded_logits(self.net, self.front(), input_ids, attention_mask)

    def _refuse_unknown(self, ids: Tensor, name: str) -> None:
        table: Any = self.net.get_input_embeddings()
        if ids.numel() and (int(ids.max()) >= len(table.weight) or int(ids.min()) < 0):
            refuse_unknown(self.net, ids.tolist(), [f"{name}, row {i + 1}" for i in range(len(ids))])

    def pack_logits(self, batch: Batch) -> Tensor:
        """Logits where a pack's targets are predicted: [n_targets, vocab or labels]; documents do not see each other.

        With activation checkpointing the caller keeps `packed_attention` open through the backward.
        """
        front, batch = self.front(), batch.to(self.device)
        if (hidden := self._fused(batch, front)) is not None:
            of_head: Tensor = self.net.get_output_embeddings()(hidden)
            return of_head
        return self._plain_logits(batch, front)

    def pack_loss(self, batch: Batch) -> Tensor:
        """The summed negative log-likelihood of a pack's targets: a float32 scalar.

        Where blocks are fused and the head is the base's own, no whole matrix of logits is made.
        """
        front, batch = self.front(), batch.to(self.device)
        if (hidden := self._fused(batch, front)) is None:
            return summed_cross_entropy(self._plain_logits(batch, front), batch.target_ids, spend=True)
        head = self.net.get_output_embeddings()
        if wears(head):
            return summed_cross_entropy(head(hidden), batch.target_ids, spend=True)
        weight = self.places.weights["lm_head"]
        return head_loss(hidden, weight, getattr(head, "bias", None), batch.target_ids, self.arena)

    def _plain_logits(self, batch: Batch, front: Prefix | None) -> Tensor:
        """`pack_logits` by the model's own code."""
        with recomputed_blocks(self.net, self.run.blocks) if self.run.again else nullcontext():
            if self.kind == "classify":
                return pack_label_logits(self.net, front, batch, self.run)
            if self.kind == "seq2seq":
                return pack_answer_logits(self.net, front, batch, self.run)
            shifted = self._shifted(batch) if self.run.seed is not None else {}
            if not packs(self.net):
                return one_by_one(self.net, front, batch)
            try:
                with packed_attention(self.net):
                    out = self.net(**pack_arguments(self.net, front, batch), **shifted, use_cache=False)
            except DocumentsLost:
                cannot_pack(self.net)
                return one_by_one(self.net, front, batch)
            logits: Tensor = out.logits.squeeze(0)  # an index would make its gradient whole once more
            return logits

    def why_plain(self) -> str | None:
        """Why packs are computed in training by the model's own code, in a few words; None where blocks are fused."""
        if self.kind != "causal":
            return f"the base is a {NAMES[self.kind]}"
        used = [self.adapters[name].spec for name in self.run.use]
        if virtual := [s.name for s in used if s.sits in ("input", "cache")]:
            return f"{virtual[0]} stands in front of the sequence"
        if cut := [s.name for s in used if s.groups(10**6) is not None]:
            return f"{cut[0]} cuts attention in training"
        return why_plain(self.net, self.places.weights, training=True)

    def _fused(self, batch: Batch, front: Prefix | None) -> Tensor | None:
        """What the head reads at a pack's targets, by fused blocks; None where the model's own code is to run."""
        if self.kind != "causal" or front is not None or (self.run.seed is not None and self._shifted(batch)):
            return None
        try:
            return fused_hidden(
                self.net,
                self.places.weights,
                batch,
                self.arena,
                training=self.run.seed is not None,
                again=self.run.again,
            )
        except Plain:
            return None

    def _shifted(self, batch: Batch) -> dict[str, Any]:
        """How attention is cut in a training step, for a method that does so. Raises AdapterError where it cannot."""
        for made in (self.adapters[name] for name in self.run.use):
            if (groups := shifted_documents(batch.bounds, made.spec.groups, self.device)) is not None:
                if not packs(self.net):
                    raise AdapterError(f"{type(self.net).__name__} computes attention by itself: it cannot be cut.")
                return {"shifted": groups}
        return {}


def _refuse_other_than_rows(ids: Any, name: str) -> None:
    if not isinstance(ids, Tensor):
        raise ShapeError(
            f"{name} must be a tensor [batch, tokens], not {type(ids).__name__}. Wrap it: torch.tensor([ids])."
        )
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ShapeError(
            f"{name} must be token ids [batch, tokens], one token or more, not {list(ids.shape)} {ids.dtype}."
        )
