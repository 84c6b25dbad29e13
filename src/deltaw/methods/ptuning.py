"""P-tuning (arXiv:2103.10385): prompt tuning whose vectors a small encoder makes while they train.

    p = W3 relu(W2 relu(W1 E + b1) + b2) + b3         encoder "mlp"
    p = W2 relu(W1 LSTM(E) + b1) + b2                 encoder "lstm": two directions, `depth` layers (section 3.2)
    e' = [p_1 ... p_n, e_1 ... e_T]                   in front of the token embeddings, as in prompt tuning

E [n, d] with d the width of a token's embedding. The encoder is not saved: p [n, d] alone is. Count: n * d saved; with
"mlp" and hidden h, n * d + h * (d + 1) + h * (h + 1) + d * (h + 1) train.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor

from deltaw.core.site import VirtualSite
from deltaw.core.spec import Params, Start
from deltaw.methods.virtual import Virtual, fresh_params, linear_shapes


class PTuning(Virtual):
    """Settings of P-tuning; those of `Virtual` and

    encoder  "mlp", "lstm", or "none": the vectors stand for themselves, as in a saved adapter
    hidden   width of the encoder (of each direction of the LSTM); None: that of a token's embedding
    depth    layers of the LSTM
    dropout  between the LSTM's layers, in training only
    """

    name: ClassVar[str] = "ptuning"
    sits: ClassVar[Literal["linear", "block", "input", "cache"]] = "input"
    lr: ClassVar[float] = 1e-2
    peft_type: ClassVar[str | None] = "P_TUNING"
    plain: ClassVar[dict[str, Any]] = {"encoder": "none", "hidden": None, "depth": 2, "dropout": 0.0}

    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    hidden: int | None = None
    depth: int = 2
    dropout: float = 0.0

    @model_validator(mode="after")
    def _settings_belong_to_the_encoder(self) -> PTuning:
        if self.hidden is not None and (self.hidden < 1 or self.encoder == "none"):
            raise ValueError("hidden is the width of an encoder, at least 1")
        if self.encoder != "lstm" and (self.depth, self.dropout) != (2, 0.0):
            raise ValueError('depth and dropout are the LSTM\'s: set encoder = "lstm", or leave them out')
        if self.depth < 1 or not 0 <= self.dropout < 1 or (self.dropout and self.depth == 1):
            raise ValueError("depth must be at least 1, dropout below 1; dropout lies between two layers")
        return self

    def shapes(self, site: VirtualSite, targeted: bool = True) -> dict[str, tuple[int, ...]]:
        n, d = site.stacks * self.n_tokens, site.width
        h = self.hidden or d
        if self.encoder == "none":
            return {"vectors": (n, d)}
        if self.encoder == "mlp":
            return {"E": (n, d), **linear_shapes(1, d, h), **linear_shapes(2, h, h), **linear_shapes(3, h, d)}
        shapes: dict[str, tuple[int, ...]] = {"E": (n, d)}
        for layer in range(self.depth):
            n_in = 2 * h if layer else d
            for name, shape in zip(_lstm(layer), [(4 * h, n_in), (4 * h, h), (4 * h,), (4 * h,)] * 2, strict=True):
                shapes[name] = shape
        return {**shapes, **linear_shapes(1, 2 * h, 2 * h), **linear_shapes(2, 2 * h, d)}

    def init(self, site: VirtualSite, start: Start) -> Params:
        shapes = self.shapes(site)
        if self.encoder == "none":
            return {"vectors": torch.empty(shapes["vectors"], dtype=torch.float32).normal_(generator=start.rng)}
        return fresh_params(shapes, start.rng, self.hidden or site.width)

    def vectors(self, params: Params, rng: torch.Generator | None = None) -> Tensor:
        if self.encoder == "none":
            return params["vectors"]
        y, last = params["E"], 3
        if self.encoder == "lstm":
            y, last = self._read_by_lstm(params, rng), 2
        for number in range(1, last + 1):
            y = torch.addmm(params[f"b{number}"], y, params[f"W{number}"].T)
            y = F.relu(y) if number < last else y
        return y

    def _read_by_lstm(self, params: Params, rng: torch.Generator | None) -> Tensor:
        """E [n, d] through the layers, each of which reads it in both directions: [n, 2 * hidden]."""
        y = params["E"].unsqueeze(0)
        for layer in range(self.depth):
            weights = [params[name] for name in _lstm(layer)]
            if layer and rng is not None and self.dropout:
                keep = torch.rand(y.shape, generator=rng, dtype=torch.float32) >= self.dropout
                y = y * keep.to(y).div_(1 - self.dropout)
            zero = y.new_zeros(2, 1, weights[1].shape[1])
            with torch.backends.cudnn.flags(enabled=False):  # cuDNN has a backward for modules in training mode only
                y = torch.lstm(y, (zero, zero), weights, True, 1, 0.0, False, True, True)[0]
        return y.squeeze(0)

    def to_peft(self, sites: list[VirtualSite]) -> dict[str, Any]:
        return {
            **super().to_peft(sites),
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
        }


def _lstm(layer: int) -> list[str]:
    """Names of one layer's parameters, forward and reverse, as torch.nn.LSTM has them."""
    parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    return [f"{part}_l{layer}{way}" for way in ("", "_reverse") for part in parts]
