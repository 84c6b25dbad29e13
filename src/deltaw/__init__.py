"""deltaw: train, keep, merge and serve small changes (dW) to large frozen language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from deltaw.errors import DeltawError

if TYPE_CHECKING:
    from deltaw.core.adapter import Adapter, Replacement
    from deltaw.core.affine import Affine
    from deltaw.core.fingerprint import BaseFingerprint
    from deltaw.diagnose.diagnose import Diagnosis, diagnose
    from deltaw.export.llama_cpp import export_gguf
    from deltaw.export.peft import export_peft
    from deltaw.export.vllm import export_vllm
    from deltaw.merge.bake import bake
    from deltaw.merge.combine import combine
    from deltaw.merge.compress import compress
    from deltaw.merge.extract import extract
    from deltaw.methods import *  # noqa: F403
    from deltaw.methods import METHODS
    from deltaw.model.base import load_base
    from deltaw.model.model import Model
    from deltaw.store.peft import read_adapter as load_adapter
    from deltaw.store.registry import Registry
    from deltaw.train.readapt import readapt
    from deltaw.train.recipe import Recipe, load_recipe
    from deltaw.train.run import train

__version__ = "0.1.0"

_LATER = {  # loaded on first use: torch and transformers take seconds to import
    "METHODS": ("deltaw.methods", "METHODS"),
    "Adapter": ("deltaw.core.adapter", "Adapter"),
    "Affine": ("deltaw.core.affine", "Affine"),
    "BaseFingerprint": ("deltaw.core.fingerprint", "BaseFingerprint"),
    "Diagnosis": ("deltaw.diagnose.diagnose", "Diagnosis"),
    "Model": ("deltaw.model.model", "Model"),
    "Replacement": ("deltaw.core.adapter", "Replacement"),
    "Registry": ("deltaw.store.registry", "Registry"),
    "readapt": ("deltaw.train.readapt", "readapt"),
    "Recipe": ("deltaw.train.recipe", "Recipe"),
    "bake": ("deltaw.merge.bake", "bake"),
    "export_gguf": ("deltaw.export.llama_cpp", "export_gguf"),
    "export_peft": ("deltaw.export.peft", "export_peft"),
    "export_vllm": ("deltaw.export.vllm", "export_vllm"),
    "combine": ("deltaw.merge.combine", "combine"),
    "compress": ("deltaw.merge.compress", "compress"),
    "extract": ("deltaw.merge.extract", "extract"),
    "diagnose": ("deltaw.diagnose.diagnose", "diagnose"),
    "load_adapter": ("deltaw.store.peft", "read_adapter"),
    "load_base": ("deltaw.model.base", "load_base"),
    "load_recipe": ("deltaw.train.recipe", "load_recipe"),
    "train": ("deltaw.train.run", "train"),
}

__all__ = [
    "METHODS",
    "Adapter",
    "Affine",
    "BaseFingerprint",
    "DeltawError",
    "Diagnosis",
    "Model",
    "Recipe",
    "Registry",
    "Replacement",
    "bake",
    "combine",
    "compress",
    "diagnose",
    "export_gguf",
    "export_peft",
    "export_vllm",
    "extract",
    "load_adapter",
    "load_base",
    "load_recipe",
    "readapt",
    "train",
]


def __getattr__(name: str) -> Any:
    """A public name on first use; a method's class (Lora, Full ...) by its name in deltaw.methods."""
    if name in _LATER:
        module, attribute = _LATER[name]
        return getattr(import_module(module), attribute)
    methods = import_module("deltaw.methods") if name[:1].isupper() else None
    if methods is not None and any(method.__name__ == name for method in methods.METHODS):
        return getattr(methods, name)
    raise AttributeError(f"module 'deltaw' has no attribute {name!r}")
