"""Places in a base model where a change can sit: a linear map, a block's half, or in front of the sequence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

SiteKind = Literal["linear", "conv1d", "embedding"]


@dataclass(frozen=True)
class LinearSite:
    """One linear map of a base model, in the canonical orientation y = W x with W [out, in].

    name          its module path, "model.layers.0.self_attn.q_proj"
    in_features   columns of W; an embedding is a linear map of one-hot vectors: its vocabulary
    out_features  rows of W
    kind          how the base stores it: "linear" [out, in], "conv1d" and "embedding" [in, out]
    has_bias      whether the base has a bias here
    is_head       whether it is the model's output embedding
    """

    name: str
    in_features: int
    out_features: int
    kind: SiteKind = "linear"
    has_bias: bool = False
    is_head: bool = False

    @property
    def role(self) -> str:
        """The last part of the name: "q_proj", "c_attn", "lm_head"."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def layer(self) -> int | None:
        """The number of the block it belongs to (the first number in its path), or None."""
        return _layer(self.name)


@dataclass(frozen=True)
class BlockSite:
    """One half of a transformer block, attention or feed-forward: from the input of its first linear map to the
    output of its last one, before the residual sum.

    name   the path of the last map, "model.layers.0.self_attn.o_proj": its output is the half's output
    entry  the path of the first map, "model.layers.0.self_attn.q_proj": its input is the half's input
    width  features of both
    part   "attention" or "ffn"
    """

    name: str
    entry: str
    width: int
    part: Literal["attention", "ffn"]
    kind: Literal["block"] = "block"

    @property
    def role(self) -> str:
        """The half it is: "attention" or "ffn"."""
        return self.part

    @property
    def layer(self) -> int | None:
        """The number of the block it belongs to, or None."""
        return _layer(self.name)


@dataclass(frozen=True)
class VirtualSite:
    """The front of the sequence, where learned vectors can stand.

    kind        "input": vectors beside the token embeddings; "cache": keys and values in front of each layer's
    width       features of a token embedding
    stacks      sequences that get vectors of their own: 1, or 2 for an encoder and a decoder
    n_layers, n_heads, head_dim  of the cache: layers, key-value heads, features of a head
    gain        what the base multiplies its token embeddings by (Gemma); vectors stand behind it
    """

    name: str
    kind: Literal["input", "cache"]
    width: int
    stacks: int = 1
    n_layers: int = 0
    n_heads: int = 0
    head_dim: int = 0
    gain: float = 1.0

    @property
    def role(self) -> str:
        """What it is called: its name."""
        return self.name

    @property
    def layer(self) -> None:
        """It belongs to no block."""
        return None


Site = LinearSite | BlockSite | VirtualSite


def site_from(plain: dict[str, Any]) -> Site:
    """The place that `dataclasses.asdict` made into `plain`."""
    kinds: dict[Any, type[Site]] = {"block": BlockSite, "input": VirtualSite, "cache": VirtualSite}
    return kinds.get(plain.get("kind"), LinearSite)(**plain)


def plain_site(site: Site) -> dict[str, Any]:
    """A place as plain data."""
    return asdict(site)


EXITS = (
    "o_proj", "out_proj", "c_proj", "out_lin", "o", "down_proj", "fc2", "fc_out", "lin2", "wo", "w2", "dense",
    "dense_4h_to_h",
)  # fmt: skip
"""What architectures call the last map of a half, whose output goes to the residual sum."""


def find_blocks(sites: Iterable[LinearSite]) -> dict[str, BlockSite]:
    """The halves of every block, by name, from the model's linear maps in their order.

    Maps of one block belong to an attention when their path says so ("attn", "attention"; self and cross attention
    are two halves), else to its feed-forward. A half ends at the last map with a name of `EXITS`, else at its last map,
    and counts where its first map takes as many features as that one gives.
    """
    halves: dict[tuple[str, str], list[LinearSite]] = {}
    for site in sites:
        found = re.match(r"(.*\.\d+)\.(.+)$", site.name)
        if found and site.kind != "embedding":
            attention = re.match(r"(?:[^.]*\.)*?[^.]*att[^.]*", found.group(2), re.IGNORECASE)
            halves.setdefault((found.group(1), attention.group() if attention else ""), []).append(site)
    made = {}
    for (_, attention_path), maps in halves.items():
        last = next((m for m in reversed(maps) if m.role in EXITS), maps[-1])
        owner = last.name.rpartition(".")[0]
        others = [m for m in maps if m is not last]
        first = next((m for m in others if m.name.rpartition(".")[0] == owner), others[0] if others else last)
        if first is not last and first.in_features == last.out_features:
            part: Literal["attention", "ffn"] = "attention" if attention_path else "ffn"
            made[last.name] = BlockSite(last.name, first.name, last.out_features, part)
    return made


def _layer(name: str) -> int | None:
    found = re.match(r".*?\.[^.]*\.(\d+)\.", "." + name)
    return int(found.group(1)) if found else None
