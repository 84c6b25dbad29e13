"""Where in a transformers model a change can sit."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from deltaw.core.site import LinearSite


def find_sites(net: PreTrainedModel) -> dict[str, LinearSite]:
    """Every plain linear map, Conv1D and embedding of `net`, by path, in the model's order.

    Only exact classes count: a subclass may compute something else.
    """
    head, embedding = net.get_output_embeddings(), net.get_input_embeddings()
    sites: dict[str, LinearSite] = {}
    for name, module in net.named_modules():
        if type(module) is nn.Linear:
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
