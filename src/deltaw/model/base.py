"""From a name to a model that can wear adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from deltaw.core.checkpoint_files import read_json
from deltaw.core.fingerprint import fingerprint_folder
from deltaw.data.task import Task, read_labels
from deltaw.errors import BaseError, near
from deltaw.formats import FORMATS, QUANTISED
from deltaw.model.kinds import folder_kind, wants_labels
from deltaw.model.load import folder_format, load_tokenizer, load_transformers, resolve_base
from deltaw.model.model import Model
from deltaw.model.originals import originals
from deltaw.model.quantised import Format, frozen_weights
from deltaw.store.peft import noted


def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX-512 BF16 or AMX)."""
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(check and check())


def best_dtype(trains_base: bool = False, device: str = "cpu") -> str:
    """What dtype "auto" means: bfloat16 where the CPU or the GPU has it, else float32; float32 for full fine-tuning."""
    fast = has_fast_bfloat16() if torch.device(device).type == "cpu" else torch.cuda.is_bf16_supported()
    return "bfloat16" if fast and not trains_base else "float32"


def check_device(device: str) -> None:
    """Raise BaseError unless `device` ("cpu", "cuda", "cuda:1") is one that this machine can compute on."""
    kind, _, number = str(device).partition(":")
    if kind not in ("cpu", "cuda") or not (number == "" or (kind == "cuda" and number.isdecimal())):
        raise BaseError(f"unknown device {device!r}.\n  Known: cpu, cuda, and cuda:N for the GPU numbered N.")
    if kind == "cuda" and not (torch.cuda.is_available() and int(number or 0) < torch.cuda.device_count()):
        found = f"{torch.cuda.device_count()} GPUs" if torch.cuda.is_available() else "no GPU that PyTorch can use"
        raise BaseError(f"device {device!r} is not there: found {found}.\n  Use cpu, or install a CUDA build of torch.")


def labels_for(base: str | Path, adapter: str | Path | None, given: Sequence[str] | None) -> list[str] | None:
    """The labels to load `base` with: those that a saved adapter chooses from, else `given` where the base classifies.

    None: it is no classifier, or has labels of its own. Raises BaseError, AdapterError, NotFound.
    """
    told = noted(adapter) if adapter is not None else {}
    if told.get("labels"):
        return list(told["labels"])
    if given is None or not (
        told.get("kind") == "classify" or wants_labels(read_json(resolve_base(base) / "config.json"))
    ):
        return None
    return list(given)


def task_before(base: str | Path, labels: Sequence[str] | None) -> Task:
    """What rows become for a base that is not loaded yet. Raises BaseError."""
    folder = resolve_base(base)
    config = read_json(folder / "config.json")
    kind = folder_kind(config, labels, folder)
    own = [str(name) for name in (config.get("id2label") or {}).values()] or ["LABEL_0", "LABEL_1"]
    return Task(kind, tuple(labels or own) if kind == "classify" else ())


def load_base(
    path: str | Path,
    format: str = "dense",
    dtype: str | torch.dtype = "float32",
    say: Callable[[str], None] | None = None,
    *,
    block: int = 64,
    double_quant: bool = False,
    labels: str | Path | Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Model:
    """Load a base model to attach adapters to.

    path    a folder in Hugging Face layout, a hub id, a .gguf file, or a starter name
    format  how its linear weights are kept: "dense" (as the folder has them), or quantised while they load: "nf4",
            "fp4", "int4", "int8". Head, embeddings, norms and biases stay in `dtype`
    dtype   "float32", "bfloat16", "float16", "float64" or such a torch dtype; "auto": bfloat16 where the CPU has it
    say     called with a sentence when something takes a while (a download, a conversion)
    block, double_quant  of a quantised format: values that share a scale (32 to 4096); scales in 8 bits too
    labels  what a text classifier chooses from, or a JSON file with the list: an encoder gets a fresh head for them.
            None: as the folder's head has them; encoder-decoders and causal language models have none
    seed    of a fresh head
    device  "cpu", "cuda" or "cuda:N": where the base is kept and computes. It is loaded on the CPU first

    Raises BaseError, DataError for labels that are no list of two or more.
    """
    dtype = str(dtype).removeprefix("torch.")
    if not isinstance(path, str | Path):
        raise BaseError(f"A base is a path or a name, not {type(path).__name__}.")
    check_device(device)
    if format not in FORMATS:
        raise BaseError(f"Unknown format {format!r}.{near(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    how = Format(format, block, double_quant) if format in QUANTISED else None
    if how is None and (double_quant or block != 64):
        raise BaseError("double_quant and block belong to a quantised format: pass format='nf4' or another one too.")
    labels = None if labels is None else read_labels(labels)
    folder = resolve_base(path, say=say)
    with ThreadPoolExecutor(1) as aside:  # hashing reads the same pages that loading reads
        fingerprint = aside.submit(fingerprint_folder, folder)
        net = load_transformers(folder, best_dtype(device=device) if dtype == "auto" else dtype, how, labels, seed)
        found = fingerprint.result()
    if weights := list(frozen_weights(net).values()):
        first = weights[0]
        kept = Format(first.name, first.block, first.double_quant)
        found = found.model_copy(update={"format": str(kept)})
    model = Model(net.to(device), load_tokenizer(folder), found, folder)
    if how is not None and folder_format(folder) is None:
        model.originals = originals(folder, model.places.sites, net.base_model_prefix)
    return model
