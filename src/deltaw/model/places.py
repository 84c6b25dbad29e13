"""What a model offers to adapters: its linear maps, the halves of its blocks, the front of its sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from deltaw.core.site import BlockSite, LinearSite, Site, VirtualSite, find_blocks
from deltaw.core.spec import MethodSpec
from deltaw.core.targets import select, select_blocks
from deltaw.core.weight import Weight
from deltaw.errors import TargetError


@dataclass(frozen=True)
class Places:
    """Where changes can sit in one model.

    sites    its linear maps by path, with their `weights` and `biases`
    modules  all its named modules
    blocks   halves of blocks by name
    virtual  the front of the sequence, by kind: "input", "cache"
    """

    sites: dict[str, LinearSite]
    weights: Mapping[str, Weight]
    biases: Mapping[str, Tensor | None]
    modules: dict[str, nn.Module]
    blocks: dict[str, BlockSite] = field(default_factory=dict)
    virtual: dict[str, VirtualSite] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        net: PreTrainedModel,
        sites: dict[str, LinearSite],
        weights: Mapping[str, Weight],
        biases: Mapping[str, Tensor | None],
        modules: dict[str, nn.Module],
    ) -> Places:
        """The places of `net`."""
        return cls(sites, weights, biases, modules, find_blocks(sites.values()), _virtual(net))

    def chosen(self, spec: MethodSpec) -> dict[str, Site]:
        """Where `spec` sits, by name, in the model's order. Raises TargetError when there is no such place.

        A targeted map at which the method has no parameters (BitFit where there is no bias) is not among them.
        """
        if spec.sits == "linear":
            return {s.name: s for s in select(spec, list(self.sites.values())) if spec.shapes(s)}
        if spec.sits == "block":
            return {s.name: s for s in select_blocks(spec, list(self.blocks.values()))}
        site = self.virtual.get(spec.sits)
        if site is None or not spec.sits_at(site):
            raise TargetError(f"Method {spec.name!r} needs a sequence that vectors can stand in front of; found none.")
        return {site.name: site}

    def find(self, spec: MethodSpec, name: str) -> Site | None:
        """The place called `name` among those of the kind that `spec` sits on."""
        kinds: dict[str, Mapping[str, Site]] = {"linear": self.sites, "block": self.blocks}
        return kinds.get(spec.sits, {s.name: s for s in self.virtual.values()}).get(name)

    def weight_at(self, site: Site) -> Weight | None:
        """The frozen matrix there: of the map, of the half's last map, of the token embeddings."""
        if isinstance(site, VirtualSite):
            return next((w for n, w in self.weights.items() if self.sites[n].kind == "embedding"), None)
        return self.weights[site.name]


def _virtual(net: PreTrainedModel) -> dict[str, VirtualSite]:
    config: Any = net.config.get_text_config(decoder=True) if hasattr(net.config, "get_text_config") else net.config
    embeddings = net.get_input_embeddings()
    width = getattr(embeddings, "embedding_dim", None)
    if width is None:
        return {}
    stacks = 2 if getattr(config, "is_encoder_decoder", False) else 1
    gain = getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", 1.0))
    found = {"input": VirtualSite("prompt", "input", width, stacks, gain=float(gain))}
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    if stacks == 2:  # T5's, elsewhere `config` is the decoder's already
        layers = getattr(config, "num_decoder_layers", None) or layers
    if isinstance(heads, int) and isinstance(layers, int):
        shared = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            shared = 1  # Falcon and GPT-BigCode: one key head for all
        dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or config.hidden_size // heads
        found["cache"] = VirtualSite("prefix", "cache", width, stacks, layers, shared, dim)
    return found
