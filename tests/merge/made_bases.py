"""Helpers of the merge tests: folders of tiny bases, noisy adapters, an oracle written the slow way."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deltaw.core.adapter import Adapter
from deltaw.core.spec import MethodSpec
from deltaw.methods.lora import Lora
from deltaw.model.base import load_base
from models import make_tokenizer, randomise

TEXT = " ".join(f"w{(7 * i + 3) % 53}" for i in range(40))


def save_base(net: PreTrainedModel, folder: Path, shard: str = "1GB") -> Path:
    net.config.architectures = [type(net).__name__]
    net.save_pretrained(folder, max_shard_size=shard)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def noisy(folder: Path, spec: MethodSpec | None = None, seed: int = 1) -> Adapter:
    """An adapter for the base in `folder`, with noise in every tensor; by default rank 3, alpha 5."""
    model = load_base(folder)
    model.attach(spec or Lora(rank=3, alpha=5))
    randomise(model, seed=seed)
    return model.adapter()


def attached_logits(folder: Path, adapter: Adapter, ids: Tensor) -> Tensor:
    model = load_base(folder)
    model.attach(adapter)
    with torch.no_grad():
        return model.logits(ids)


def plain(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    """The folder as a user loads it, strictly."""
    net, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return net.eval()


def logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return plain(folder)(ids).logits.float()


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the files of a folder."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def rename(folder: Path, change) -> Path:
    """Rename the tensors of a one-file checkpoint; `change` gives the new name, or None to drop it."""
    path = folder / "model.safetensors"
    renamed = {change(k): v.clone() for k, v in load_file(path).items()}
    path.unlink()
    save_file({k: v for k, v in renamed.items() if k is not None}, path, metadata={"format": "pt"})
    return folder


def renamed_base(folder, tie=False):
    """A checkpoint with names that transformers changes on load."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        vocab_size=53, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, layer_types=["full_attention"] * 2, tie_word_embeddings=tie,
        max_position_embeddings=64, pad_token_id=None, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    save_base(Qwen3_5ForCausalLM(config), folder)
    return rename(folder, lambda k: k.replace("model.", "model.language_model.", 1) if k[0] == "m" else k)


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def oracle(folder: Path, adapter: Adapter, kinds: dict[str, str]) -> dict[str, Tensor]:
    """What the files must hold after merging a LoRA: the formula, tensor by tensor, in float64."""
    wanted = {k: v.double() for k, v in stored(folder).items()}
    for site, params in adapter.sites.items():
        if "A" in params:
            delta = adapter.spec.alpha / adapter.spec.rank * (params["B"].double() @ params["A"].double())
            key = f"{site}.weight"
            wanted[key] = wanted[key] + (delta.T if kinds[site] != "linear" else delta)
        if "bias" in params:
            wanted[f"{site}.bias"] = params["bias"].double()
    for r in adapter.replaced:
        wanted[r.tensor] = r.value.double()
    return wanted
