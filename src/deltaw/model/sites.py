"""Where in a transformers model a change can sit."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaw.core.site import LinearSite


def find_sites(net: PreTrainedModel) -> dict[str, LinearSite]:
    """Every plain linear map, Conv1D and embedding of `net`, by path, in the model's order.

    A subclass counts only where it computes the same: it may do something else with its weight.
    """
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    sites: dict[str, LinearSite] = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and _is_plain(module):
            sites[name] = LinearSite(
                name,
                module.in_features,
                module.out_features,
                "linear",
                module.bias is not None,
                module is head,
            )
        elif type(module) is Conv1D:
            n_in, n_out = module.weight.shape
            sites[name] = LinearSite(name, n_in, n_out, "conv1d", module.bias is not None)
        elif type(module) is nn.Embedding or module is embedding:
            sites[name] = LinearSite(name, module.num_embeddings, module.embedding_dim, "embedding")
    return sites


@torch.no_grad()
def _is_plain(module: nn.Linear) -> bool:
    """Whether `module` computes W x + b: by its class, or by trying (Falcon's subclass does)."""
    if type(module).forward is nn.Linear.forward:
        return True
    if module.weight.is_meta or module.weight.shape != (module.out_features, module.in_features):
        return False
    x = torch.linspace(-1, 1, module.in_features, dtype=module.weight.dtype).unsqueeze(0)
    try:
        return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), rtol=1e-2, atol=1e-2)
    except (RuntimeError, TypeError, ValueError):  # it wants other arguments: not a plain map
        return False
