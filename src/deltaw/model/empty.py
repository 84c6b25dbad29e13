"""A base's network without its weights: names and shapes for milliseconds and no memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from deltaw.core.checkpoint_files import read_json
from deltaw.errors import BaseError
from deltaw.model.kinds import AUTO, NAMES, folder_kind, with_labels
from deltaw.model.quiet import UNUSABLE, making, quiet


def empty_network(folder: Path, labels: Sequence[str] | None = None) -> PreTrainedModel:
    """The network of a folder's config.json without memory for its weights. Raises BaseError.

    labels  of a text classifier; None: as the folder's head has them
    """
    kind = folder_kind(read_json(folder / "config.json"), labels, folder)
    try:
        with making(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            net = AUTO[kind].from_config(with_labels(config, labels), trust_remote_code=False)
    except UNUSABLE as problem:
        raise BaseError(
            f"{folder} is no {NAMES[kind]} that transformers knows: {problem}\n  Check its config.json."
        ) from problem
    net.tie_weights()
    return net.eval()


def network_from(config: dict[str, Any], dtype: torch.dtype, labels: Sequence[str] | None = None) -> PreTrainedModel:
    """The network of what a config.json says, in `dtype`, without memory for its weights. Raises BaseError.

    labels  of a text classifier; None: as the head of the config has them
    """
    settings = {k: v for k, v in config.items() if k not in ("quantization_config", "dtype", "torch_dtype")}
    family = str(settings.pop("model_type", None))
    kind = folder_kind(config, labels, family)
    try:
        with making(), torch.device("meta"):
            made = with_labels(AutoConfig.for_model(family, **settings), labels)
            net = AUTO[kind].from_config(made, dtype=dtype, trust_remote_code=False)
    except UNUSABLE as problem:
        raise BaseError(
            f"this config (model_type {family!r}) is no {NAMES[kind]} that transformers knows: {problem}\n"
            "  Check its config.json."
        ) from problem
    net.tie_weights()
    return net.eval().requires_grad_(False)


def config_from_hub(name: str) -> Path:
    """The config.json of hub id `name`, fetched alone or from the hub's cache. Raises BaseError."""
    from huggingface_hub import constants, hf_hub_download

    try:
        with quiet():
            return Path(hf_hub_download(name, "config.json", etag_timeout=10))
    except Exception as problem:
        offline = " (offline: HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
        first = next((line.strip() for line in str(problem).splitlines() if line.strip()), type(problem).__name__)
        raise BaseError(
            f"config.json of hub id {name!r} cannot be had{offline}: {first}\n"
            "  Give a folder with a config.json, or one of the shapes that `deltaw plan` knows, as 7B."
        ) from problem
