"""Where in a transformers model a change can sit."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaw.core.site import LinearSite
from deltaw.model.frozen import FrozenLinear
from deltaw.model.kinds import outside_encoder


def find_sites(net: PreTrainedModel) -> dict[str, LinearSite]:
    """Every plain linear map, Conv1D and embedding of `net`, by path, in the model's order.

    A subclass counts only where it computes the same: it may do something else with its weight.
    """
    head, embedding, beside = net.get_output_embeddings(), net.get_input_embeddings(), outside_encoder(net)
    sites: dict[str, LinearSite] = {}
    for name, module in net.named_modules():
        if isinstance(module, FrozenLinear):
            sites[name] = LinearSite(
                name, module.in_features, module.out_features, module.kind, module.bias is not None
            )
            continue
        if isinstance(module, nn.Linear) and _is_plain(module):
            sites[name] = LinearSite(
                name,
                module.in_features,
                module.out_features,
                "linear",
                module.bias is not None,
                module is head or name.split(".")[0] in beside,
            )
        elif type(module) is Conv1D:
            n_in, n_out = module.weight.shape
            sites[name] = LinearSite(name, n_in, n_out, "conv1d", module.bias is not None)
        elif type(module) is nn.Embedding or module is embedding:
            sites[name] = LinearSite(name, module.num_embeddings, module.embedding_dim, "embedding")
    return sites


def _is_plain(module: nn.Linear) -> bool:
    """Whether `module` computes W x + b: by its class, or by trying a small one of that class (Falcon's does)."""
    return type(module).forward is nn.Linear.forward or _computes_plainly(type(module))  # type: ignore[arg-type]


@cache
@torch.no_grad()
def _computes_plainly(kind: type[nn.Linear]) -> bool:
    try:
        with torch.device("cpu"):
            small = kind(5, 3).float()  # while a base is loaded, the process's dtype is the base's
            small.weight.copy_(torch.arange(15.0, dtype=torch.float32).reshape(3, 5).sin())
            small.bias.copy_(torch.tensor([0.5, -1.0, 2.0], dtype=torch.float32))
            x = torch.arange(10.0, dtype=torch.float32).reshape(2, 5).cos()
            return torch.allclose(small(x), nn.functional.linear(x, small.weight, small.bias), atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError):  # it wants other arguments: not a plain map
        return False
