"""The matrix products of one LoRA step and nothing else, as a worker that a bench drives over stdin (workers.py).

How fast can the step be with PyTorch's own bfloat16 products? In a step of bench_train.py every linear map W of every
block, with n = batch * length rows, takes

    forward    x W^T      x A^T    (x A^T) B^T
    backward   g W        g B      (g B) A      (g B)^T x    g^T (x A^T)

and the head takes its product and its input gradient on target rows. Nobody needs a gradient for what enters the first
block, so its q, k and v have no `g W` and no `(g B) A`. Inputs are made before, outputs are written where there is room
already (one for each shape), and nothing is added: no norm, no attention scores, no loss, no optimizer. So it bounds
who computes these products one by one through PyTorch, not every program.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from workers import serve

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Product = tuple[Tensor, Tensor, Tensor]
"""a @ b goes to out."""


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--base", required=True)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    return p.parse_args()


class Room:
    """Matrices by what they are for and their shape, made once."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._made: dict[tuple[str, int, int], Tensor] = {}
        self._dtype = dtype
        self._rng = torch.Generator().manual_seed(seed)

    def __call__(self, purpose: str, rows: int, columns: int) -> Tensor:
        key = (purpose, rows, columns)
        if key not in self._made:
            self._made[key] = torch.empty(rows, columns).normal_(generator=self._rng).to(self._dtype)
        return self._made[key]


def forward(w: Tensor, n: int, rank: int, room: Room) -> Iterator[Product]:
    """Of a linear map [out, in] at n rows; rank 0: no adapter."""
    d_out, d_in = w.shape
    x = room("x", n, d_in)
    yield x, w.T, room("y", n, d_out)
    if rank:
        yield x, room("A", rank, d_in).T, room("h", n, rank)
        yield room("h", n, rank), room("B", d_out, rank).T, room("y", n, d_out)


def backward(w: Tensor, n: int, rank: int, room: Room, input_needs_it: bool) -> Iterator[Product]:
    """Likewise; without the gradient of the input where nobody needs it."""
    d_out, d_in = w.shape
    g, dx, dh = room("g", n, d_out), room("dx", n, d_in), room("dh", n, rank)
    if input_needs_it:
        yield g, w, dx
    if rank:
        yield g, room("B", d_out, rank), dh
        if input_needs_it:
            yield dh, room("A", rank, d_in), dx
        yield dh.T, room("x", n, d_in), room("dA", rank, d_in)
        yield g.T, room("h", n, rank), room("dB", d_out, rank)


def products(args: argparse.Namespace) -> list[Product]:
    """All of a step, in the order in which a step needs them."""
    dtype = getattr(torch, args.dtype)
    net = AutoModelForCausalLM.from_pretrained(args.base, dtype=dtype).requires_grad_(False)
    named = [(n, m.weight) for n, m in net.named_modules() if n.rpartition(".")[2] in LINEARS]
    head = net.get_output_embeddings().weight
    n, n_targets = args.batch * args.length, args.batch * (args.length - args.length // 2)
    room = Room(dtype, args.seed)
    found = [p for _, w in named for p in forward(w, n, args.rank, room)]
    found += [*forward(head, n_targets, 0, room), *backward(head, n_targets, 0, room, True)]
    for name, w in reversed(named):
        is_first = ".layers.0.self_attn." in name and not name.endswith("o_proj")
        found += backward(w, n, args.rank, room, not is_first)
    return found


@torch.no_grad()
def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    found = products(args)

    def step() -> float:
        for a, b, out in found:
            torch.mm(a, b, out=out)
        return 0.0

    gflop = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in found) / 1e9
    serve(step, gflop=round(gflop, 1), products=len(found))


if __name__ == "__main__":
    main()
