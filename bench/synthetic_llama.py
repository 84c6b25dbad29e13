"""Write a sharded Llama checkpoint with random weights, for loading and memory figures of a size that ships nowhere.

    .venv/bin/python bench/synthetic_llama.py OUT [--hidden 2048] [--inner 5632] [--layers 32] [--dtype bfloat16]

The defaults have 1.6 billion parameters in 3.2 GB of bfloat16, in shards of 1 GB. Weights are normal with the standard
deviation that keeps activations of order one, written one shard at a time. The tokenizer is the starter's.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from deltaw.merge.checkpoint import Planned, write_shards
from deltaw.model.load import DTYPES, load_tokenizer


def shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the checkpoint by name."""
    d, inner = config.hidden_size, config.intermediate_size
    kv = d * config.num_key_value_heads // config.num_attention_heads
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        yield from ((f"{at}.{n}.weight", (d,)) for n in ("input_layernorm", "post_attention_layernorm"))
        for name, shape in (("q", (d, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, d))):
            yield f"{at}.self_attn.{name}_proj.weight", shape
        for name, shape in (("gate", (inner, d)), ("up", (inner, d)), ("down", (d, inner))):
            yield f"{at}.mlp.{name}_proj.weight", shape
    yield "model.norm.weight", (d,)


def values(config: LlamaConfig, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors with their random values."""
    rng = torch.Generator().manual_seed(seed)
    for name, shape in shapes(config):
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=dtype)
        else:
            yield name, torch.empty(shape).normal_(0, shape[1] ** -0.5, generator=rng).to(dtype)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--inner", type=int, default=5632)
    p.add_argument("--layers", type=int, default=32)
    p.add_argument("--heads", type=int, default=16)
    p.add_argument("--kv-heads", type=int, default=8)
    p.add_argument("--vocab", type=int, help="rows of the embedding; the tokenizer's tokens by default")
    p.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    p.add_argument("--shard-bytes", type=int, default=1_000_000_000)
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    tokenizer = load_tokenizer("smollm2-135m-instruct")
    config = LlamaConfig(
        vocab_size=args.vocab or len(tokenizer), hidden_size=args.hidden, intermediate_size=args.inner,
        num_hidden_layers=args.layers, num_attention_heads=args.heads, num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        architectures=["LlamaForCausalLM"], dtype=args.dtype,
    )  # fmt: skip
    args.out.mkdir(parents=True)
    dtype = DTYPES[args.dtype]
    planned = [Planned(n, torch.Size(s).numel() * dtype.itemsize) for n, s in shapes(config)]
    n_bytes = write_shards(args.out, planned, values(config, dtype, args.seed), args.shard_bytes)
    config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    n = sum(torch.Size(s).numel() for _, s in shapes(config))
    print(json.dumps({"out": str(args.out), "parameters": n, "bytes": n_bytes}))


if __name__ == "__main__":
    main()
