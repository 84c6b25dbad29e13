"""Prompt tuning (arXiv:2104.08691).

    e' = [p_1 ... p_n, e_1 ... e_T]        p [n, width] learned vectors in front of the token embeddings e

The base computes with e' as with any sequence; positions count through. Count: n * width, width being that of a token's
embedding. It does not start at the base: vectors in front of a document are seen from the first step.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor

from deltaw.core.site import VirtualSite
from deltaw.core.spec import Params, Start
from deltaw.errors import SpecError
from deltaw.methods.virtual import Virtual


class Prompt(Virtual):
    """Settings of prompt tuning; those of `Virtual` and

    start       "random" (uniform within 0.5), "vocabulary" (embeddings of tokens drawn at random) or "text"
    start_text  with "text": its tokens' embeddings, repeated or cut to n_tokens
    """

    name: ClassVar[str] = "prompt"
    sits: ClassVar[Literal["linear", "block", "input", "cache"]] = "input"
    lr: ClassVar[float] = 1e-1
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"

    start: Literal["random", "vocabulary", "text"] = "vocabulary"
    start_text: str | None = None

    @model_validator(mode="after")
    def _text_is_there_where_it_is_read(self) -> Prompt:
        if (self.start == "text") != bool(self.start_text):
            raise ValueError('start_text is the text of start = "text": give both or none')
        return self

    def shapes(self, site: VirtualSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        return {"vectors": (site.stacks * self.n_tokens, site.width)}

    def init(self, site: VirtualSite, start: Start) -> Params:
        n = site.stacks * self.n_tokens
        fresh = torch.empty(n, site.width, dtype=torch.float32)
        if self.start == "random" or fresh.is_meta:  # a plan has shapes only, and no tokenizer
            return {"vectors": fresh.uniform_(-0.5, 0.5, generator=start.rng)}
        assert start.weight is not None
        n_vocab = start.weight.in_features
        if self.start == "vocabulary":
            ids = torch.randint(0, n_vocab, (n,), generator=start.rng)
        else:
            ids = self._ids(start, n, n_vocab)
        return {"vectors": start.weight.columns(ids).detach().float() * site.gain}

    def _ids(self, start: Start, n: int, n_vocab: int) -> Tensor:
        """n token ids of the text, which begins again where it is too short."""
        found = list(start.encode(self.start_text or "")) if start.encode is not None else []
        if not found or max(found) >= n_vocab:
            raise SpecError(f"start_text {self.start_text!r} has no tokens that this base has embeddings for.")
        return torch.tensor((found * math.ceil(n / len(found)))[:n], dtype=torch.long)

    def to_peft(self, sites: list[VirtualSite]) -> dict[str, Any]:
        # PEFT reads TEXT only with the path of a tokenizer, though a finished adapter needs none
        init = "SAMPLE_VOCAB" if self.start == "vocabulary" else "RANDOM"
        return {**super().to_peft(sites), "prompt_tuning_init": init}

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Virtual:
        how = {"SAMPLE_VOCAB": "vocabulary", "TEXT": "text"}.get(str(config.get("prompt_tuning_init")), "random")
        text = config.get("prompt_tuning_init_text") if how == "text" else None
        return cls.with_settings(config, {"start": how, "start_text": text})
