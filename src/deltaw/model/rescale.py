"""Settings of a base's config that hold while an adapter is in use: more positions, rotated in another way."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from deltaw.errors import AdapterError


class Overrides:
    """Changes a network's config and rotary embeddings, and gives the base's own back."""

    def __init__(self, net: PreTrainedModel) -> None:
        self._net = net
        self._own: dict[str, Any] = {}
        self._rotary: dict[str, nn.Module] = {}
        self.now: dict[str, Any] = {}

    def apply(self, wanted: dict[str, Any]) -> None:
        """Make the config say `wanted` and nothing else that is not the base's. Raises AdapterError."""
        if wanted == self.now:
            return
        self._give_back()
        if not wanted:
            return
        config: Any = self._net.config.get_text_config()
        if unknown := [key for key in wanted if not hasattr(config, key)]:
            raise AdapterError(f"The adapter sets {', '.join(unknown)}, which this base's config does not have.")
        self._own = {key: getattr(config, key) for key in wanted}
        for key, value in wanted.items():
            setattr(config, key, value)
        for path, module in list(self._net.named_modules()):
            if hasattr(module, "inv_freq"):
                self._rotary[path] = module
                like = module.inv_freq
                self._put(path, type(module)(config).to(like.device).eval())
        self.now = dict(wanted)

    def _give_back(self) -> None:
        config: Any = self._net.config.get_text_config()
        for key, value in self._own.items():
            setattr(config, key, value)
        for path, module in self._rotary.items():
            self._put(path, module)
        self._own, self._rotary, self.now = {}, {}, {}

    def _put(self, path: str, module: nn.Module) -> None:
        parent, _, child = path.rpartition(".")
        setattr(self._net.get_submodule(parent), child, module)
