"""A base's network without its weights: names and shapes for milliseconds and no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deltaw.errors import BaseError
from deltaw.model.starter import quiet


def empty_network(folder: Path) -> PreTrainedModel:
    """The network of a folder's config.json without memory for its weights. Raises BaseError."""
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            net = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as problem:
        raise BaseError(
            f"{folder} is no causal language model that transformers knows: {problem}\n  Check its config.json."
        ) from problem
    net.tie_weights()
    return net.eval()
