"""Makers of tiny random models. Their sizes all differ, so that a swapped axis cannot hide."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from deltaw.core.fingerprint import BaseFingerprint
from deltaw.data.pack import Batch
from deltaw.model.model import Model

VOCAB, HIDDEN, INNER = 53, 32, 40
WINDOW = 6  # of Mistral and Gemma 2: shorter than most documents of the tests

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}

# dropouts are on wherever a config has them: the base's must never be applied
_MAKE = {
    "llama": lambda: LlamaConfig(**_GROUPED, attention_bias=True, mlp_bias=True, attention_dropout=0.3),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW, attention_dropout=0.3),
    "qwen2": lambda: Qwen2Config(**{**_GROUPED, "tie_word_embeddings": True}, attention_dropout=0.3),
    "gemma": lambda: GemmaConfig(
        **{**_GROUPED, "tie_word_embeddings": True}, head_dim=12, attention_bias=True, attention_dropout=0.3
    ),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=12, attention_dropout=0.3),
    "phi3": lambda: Phi3Config(**_GROUPED, sliding_window=WINDOW, attention_dropout=0.3),
    "phi": lambda: PhiConfig(**_GROUPED, resid_pdrop=0.3, embd_pdrop=0.3, attention_dropout=0.3),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_inner=INNER, n_layer=2, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, ffn_dim=INNER, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.3, attention_dropout=0.3, pad_token_id=None,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES, attention_dropout=0.3, hidden_dropout=0.3),
    "gemma2": lambda: Gemma2Config(
        **{**_GROUPED, "tie_word_embeddings": True}, head_dim=12, sliding_window=WINDOW, query_pre_attn_scalar=12,
        attn_logit_softcapping=2.0, final_logit_softcapping=5.0, attention_dropout=0.3,
    ),
}  # fmt: skip

ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma", "phi", "gpt2", "opt", "gpt_neox")
EMBEDDING = {"gpt2": "wte", "gpt_neox": "embed_in"}  # elsewhere "embed_tokens"


def make_net(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """A tiny random causal model with random biases and norms; `changes` are set in its config.

    Weights have a standard deviation near 1 / sqrt(columns), so that activations and logits are of order 1.
    """
    config = _MAKE[kind]()
    for key, value in changes.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    config._attn_implementation = "eager"
    rng = torch.Generator().manual_seed(1000 + seed)
    net = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    done: set[int] = set()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if id(value) in done:
                continue
            done.add(id(value))
            noise = torch.randn(value.shape, generator=rng)
            if value.ndim == 1:
                # a norm's weight is near one (near zero in Gemma, which adds the one); a bias is anything
                centre = 1.0 if name.endswith("weight") and not kind.startswith("gemma") else 0.0
                value.copy_(centre + 0.3 * noise)
            else:
                value.copy_(noise * value.shape[-1] ** -0.5)
    return net.to(dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of VOCAB words w0 ... w52."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1", eos_token="w2", unk_token="w0")


def make_fingerprint(**changes: str) -> BaseFingerprint:
    """A fingerprint made by hand."""
    parts = {
        "name": "Tiny-1",
        "weights": "9f0c21aa" * 8,
        "architecture": "11ab34cd" * 8,
        "model_type": "llama",
        "tokenizer": "77aa0011" * 8,
        "chat_template": "c0ffee00" * 8,
    }
    return BaseFingerprint(**{**parts, **changes}, parameters=1234)


def make_ids(rows: int = 2, length: int = 11, vocab: int = VOCAB, seed: int = 5) -> Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


def randomise(model: Model, name: str | None = None, seed: int = 1, size: float = 0.3) -> None:
    """Fill every tensor of an attached adapter with noise, B included; replaced tensors stay near the base's."""
    rng = torch.Generator().manual_seed(seed)
    made = model.adapters[name or next(iter(model.run.use))]
    with torch.no_grad():
        for key, value in made.parameters().items():
            noise = torch.randn(value.shape, generator=rng) * size
            if key.startswith(("replace:", "rows:")) or key.endswith(":bias"):
                value += noise
            else:
                value.copy_(noise)


def make_batch(documents: list[Tensor], predict: list[list[int]] | None = None) -> Batch:
    """Documents as a pack; `predict` lists the places per document whose next token is a target (default: all)."""
    lengths = [len(d) for d in documents]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    predict = [list(range(n - 1)) for n in lengths] if predict is None else predict
    at = [s + p for s, places in zip(starts, predict, strict=True) for p in places]
    ids = torch.cat(documents)
    predict_at = torch.tensor(at, dtype=torch.long)
    return Batch(
        input_ids=ids,
        positions=torch.cat([torch.arange(n) for n in lengths]),
        bounds=torch.tensor([*starts, sum(lengths)]),
        predict_at=predict_at,
        target_ids=ids[predict_at + 1],
    )


def dense_logits(kind_net: PreTrainedModel, model: Model, weights: dict[str, float], ids: Tensor) -> Tensor:
    """Logits of the base `kind_net` (another copy of model's) with the weighted sum of dense changes written in."""
    tensors = {n: t.detach().double() for n, t in kind_net.named_parameters(remove_duplicate=False)}
    base = dict(tensors)
    for name, weight in weights.items():
        made = model.adapters[name]
        for site, params in made.sites.items():
            place = model.places.sites[site]
            if "A" in params:
                change = made.spec.scale_at(place) * params["B"].detach().double() @ params["A"].detach().double()
                key = f"{site}.weight"
                tensors[key] = tensors[key] + weight * (change if place.kind == "linear" else change.T)
            if "bias" in params:
                key = f"{site}.bias"
                tensors[key] = tensors[key] + weight * (params["bias"].detach().double() - base[key])
        for key, value in made.swaps.items():
            tensors[key] = tensors[key] + weight * (value.detach().double() - base[key])
    single = {n: t.float() for n, t in tensors.items()}
    out = torch.func.functional_call(kind_net, single, (ids,), {"use_cache": False}, tie_weights=False)
    return out.logits.detach()
