"""Tiny bases with a byte-level BPE, of every family that is written as GGUF, and readers that owe us nothing."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deltaw.core.adapter import Adapter
from deltaw.core.spec import MethodSpec
from deltaw.merge.bake import bake
from deltaw.model.base import load_base
from models import make_net, randomise

TEXTS = ["the cat sat on the mat", "12 345 cats", "a  b\n\n c", "don't Don'T", "caf\u00e9 \u4f60\u597d", "<|end|> x"]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def cut(kind: str):
    """The pre-tokenizer that llama.cpp calls `kind`."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if kind == "gpt-2":
        return plain
    if kind == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    pattern = {"qwen2": QWEN2, "tekken": TEKKEN}.get(kind, LLAMA3)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), bare])


def byte_bpe(kind: str = "gpt-2", size: int = 300, texts: list[str] = TEXTS) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `size` tokens trained on `texts`, with a special token and an added word."""
    backend = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
    backend.pre_tokenizer = cut(kind)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=["<s>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.add_tokens(["dog house"])
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return tokenizer


def sentencepiece_bpe(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A BPE over characters with byte fallback, spaces as U+2581: Llama 2's kind, or without a prefix Gemma's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"acehmnot s".replace(" ", "")]
    merges = [
        ("\u2581", "t"),
        ("h", "e"),
        ("\u2581t", "he"),
        ("a", "t"),
        ("\u2581", "c"),
        ("\u2581c", "at"),
        ("o", "n"),
    ]
    merges.insert(3, ("\u2581th", "e"))
    merges.insert(1, ("\u2581t", "h"))
    vocab = dict.fromkeys([*pieces, *("".join(m) for m in merges)])
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace]) if prefix else replace
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def save_base(
    folder: Path, arch: str, tokenizer: PreTrainedTokenizerFast | None = None, initial: int = 5, **config: object
) -> Path:
    """A tiny random base of `arch` whose vocabulary is the tokenizer's, and two rows more."""
    tokenizer = tokenizer or byte_bpe("qwen2" if arch.startswith("qwen") else "gpt-2")
    net = make_net(arch)
    settings = net.config.to_dict() | {"vocab_size": len(tokenizer) + 2} | config
    if arch == "gemma":
        settings |= {"attention_bias": False}
    made: PreTrainedModel = type(net)(type(net.config)(**settings)).eval()
    rng = torch.Generator().manual_seed(initial)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    made.config.architectures = [type(made).__name__]
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def read(path: Path) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Settings and float32 tensors of a GGUF file, axes in numpy's order."""
    reader = gguf.GGUFReader(path)
    tensors = {}
    for t in reader.tensors:
        value = gguf.quants.dequantize(t.data, t.tensor_type)
        tensors[t.name] = torch.from_numpy(np.array(value, dtype=np.float32)).reshape(*(int(n) for n in t.shape[::-1]))
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k from llama.cpp's order back to transformers', written the slow way: row by row."""
    dim = rows.shape[0] // heads
    out = torch.empty_like(rows)
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + i] = rows[head * dim + 2 * i]
            out[head * dim + dim // 2 + i] = rows[head * dim + 2 * i + 1]
    return out


def noisy(folder: Path, spec: MethodSpec, seed: int = 1) -> Adapter:
    """An adapter for the base in `folder`, with noise in every tensor."""
    model = load_base(folder)
    model.attach(spec)
    randomise(model, seed=seed)
    return model.adapter()


def oracle(folder: Path, adapter: Adapter) -> dict[str, Tensor]:
    """What the adapter adds to W [out, in] at each map: the merged checkpoint less the base's, in float32."""
    merged = folder.parent / "merged"
    bake(folder, adapter, merged, measure=False)
    before, after = load_file(folder / "model.safetensors"), load_file(merged / "model.safetensors")
    turned = {p.name for p in adapter.places if p.kind == "conv1d"}
    found = {}
    for site in adapter.sites:
        added = after[f"{site}.weight"] - before[f"{site}.weight"]
        found[site] = added.T if site in turned else added
    return found
