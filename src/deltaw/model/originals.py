"""A base's weights as its checkpoint has them, one at a time: what quantising changed can be read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from deltaw.core.checkpoint_files import checkpoint_files, read_header
from deltaw.core.site import LinearSite
from deltaw.errors import BaseError


def originals(folder: Path, sites: dict[str, LinearSite], prefix: str) -> Callable[[str], Tensor]:
    """A function from a site's name to its W [out, in] as the files in `folder` have it.

    prefix  of the base model in a network with a head; files may leave it out

    The function raises BaseError where the files name a tensor in another way.
    """

    def read(name: str) -> Tensor:
        site = sites[name]
        wanted = (site.out_features, site.in_features)
        wanted = wanted if site.kind == "linear" else wanted[::-1]
        dotted = f"{prefix}."
        full = f"{name}.weight"
        for file in checkpoint_files(folder):
            header = read_header(file)
            for key in (full, full.removeprefix(dotted), dotted + full):
                if key in header and tuple(header[key][1]) == wanted:
                    with safe_open(file, "pt") as opened:
                        tensor: Tensor = opened.get_tensor(key)
                    return tensor if site.kind == "linear" else tensor.T
        raise BaseError(f"{folder} has no tensor {full} of shape {list(wanted)}: its files name it in another way.")

    return read
