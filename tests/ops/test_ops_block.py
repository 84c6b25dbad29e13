"""A fused block: every gradient against differences in float64, in each mode (gradcheck calls a backward twice)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltaw.core.affine import Affine
from deltaw.formats.dense import DenseWeight
from deltaw.ops.arena import Arena
from deltaw.ops.block import AttentionHalf, Block, FeedForward, Norm, Pack, fused
from deltaw.ops.maps import Map

WIDTH, HEADS, SHARED, DIM, WIDE = 6, 4, 2, 4, 5
EPS = 1e-5
BOUNDS = torch.tensor([0, 3, 7])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64) / 2


def mapped(out: int, wide: int, bias: bool, **parts: torch.Tensor) -> Map:
    own = {"A": drawn(2, wide), "B": drawn(out, 2), **parts}
    affine = Affine(**{p: t.requires_grad_() for p, t in own.items()}, scale=1.7)
    return Map(DenseWeight(drawn(out, wide)), drawn(out) if bias else None, affine)


def made_block(kind: str) -> Block:
    qkv = ((HEADS + 2 * SHARED) * DIM,) if kind == "whole" else (HEADS * DIM, SHARED * DIM, SHARED * DIM)
    gate_up = (2 * WIDE,) if kind == "whole" else (WIDE, WIDE)
    heads = (Norm(drawn(DIM).requires_grad_(), 1e-5), Norm(drawn(DIM), 1e-5)) if kind == "heads" else (None, None)
    gains: dict[str, Any] = {"out_gain": drawn(WIDTH), "in_gain": drawn(WIDE)} if kind == "gains" else {}
    norms = [Norm(drawn(WIDTH).requires_grad_(kind != "gains"), 1e-5, one_plus=kind == "whole") for _ in range(2)]
    return Block(
        AttentionHalf(
            norms[0],
            tuple(mapped(n, WIDTH, kind == "split") for n in qkv),
            mapped(WIDTH, HEADS * DIM, kind == "split"),
            HEADS, SHARED, DIM, 0.7, 2 if kind == "gains" else None, *heads,
        ),
        FeedForward(
            norms[1],
            tuple(mapped(n, WIDTH, False) for n in gate_up),
            mapped(WIDTH, WIDE, False, **gains),
            "gelu_tanh" if kind == "whole" else "silu",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["split", "whole", "heads", "gains"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("some_rows", [False, True])
def test_ops_block_gradients_are_right(kind: str, again: bool, some_rows: bool) -> None:
    torch.manual_seed(1)
    block, arena = made_block(kind), Arena()
    x = drawn(7, WIDTH).requires_grad_()
    angles = drawn(7, 2).repeat(1, 2)
    pack = Pack(BOUNDS, angles.cos(), angles.sin())
    rows = torch.tensor([1, 2, 6]) if some_rows else None
    trained = [t for t in block.parameters() if t.requires_grad]
    whole = fused(block, x, pack, Arena())

    def run() -> torch.Tensor:
        return fused(block, x, pack, arena, rows=rows, again=again)

    torch.testing.assert_close(run(), whole if rows is None else whole[rows])
    weights = drawn(3 if some_rows else 7, WIDTH)
    grads = torch.autograd.grad((run() * weights).sum(), [x, *trained])
    for tensor, grad in zip([x, *trained], grads, strict=True):
        way = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += EPS * way
            more = (run() * weights).sum()
            tensor -= 2 * EPS * way
            less = (run() * weights).sum()
            tensor += EPS * way
        torch.testing.assert_close((grad * way).sum(), (more - less) / (2 * EPS), rtol=1e-6, atol=1e-8)
    assert arena.kept == 0


def test_ops_block_takes_documents_apart_and_gives_its_memory_back() -> None:
    torch.manual_seed(0)
    block, arena = made_block("split"), Arena()
    x = drawn(7, WIDTH).requires_grad_()
    angles = torch.zeros(7, DIM, dtype=torch.float64)
    whole = fused(block, x, Pack(BOUNDS, angles.cos(), angles.sin()), arena)
    alone = fused(block, x[3:], Pack(torch.tensor([0, 4]), angles[3:].cos(), angles[3:].sin()), arena)
    torch.testing.assert_close(whole[3:], alone)
    (whole.sum() + alone.sum()).backward()
    assert arena.kept == 0
    with torch.no_grad():
        fused(block, x, Pack(BOUNDS, angles.cos(), angles.sin()), arena)
    assert arena.kept == 0


def test_ops_block_refuses_a_second_backward() -> None:
    torch.manual_seed(0)
    angles = torch.zeros(7, DIM, dtype=torch.float64)
    y = fused(made_block("split"), drawn(7, WIDTH), Pack(BOUNDS, angles.cos(), angles.sin()), Arena())
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="runs once"):
        y.sum().backward()


def test_ops_block_keeps_its_result_alone_where_it_is_computed_again() -> None:
    torch.manual_seed(0)
    block, arena = made_block("split"), Arena()
    x = drawn(7, WIDTH).requires_grad_()
    angles = torch.zeros(7, DIM, dtype=torch.float64)
    pack = Pack(BOUNDS, angles.cos(), angles.sin())
    y = fused(block, x, pack, arena, again=True)
    one = arena.kept
    assert y.nbytes <= one < y.nbytes + 64
    z = fused(block, y, pack, arena, again=True)
    assert arena.kept == 2 * one
    z.sum().backward()
    assert arena.kept == 0


@pytest.mark.parametrize("kind", ["split", "heads"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("some_rows", [False, True])
def test_ops_block_may_write_the_gradient_of_its_input_over_it(kind: str, again: bool, some_rows: bool) -> None:
    torch.manual_seed(2)
    blocks = [made_block(kind) for _ in range(3)]
    start = drawn(7, WIDTH)
    angles = drawn(7, 2).repeat(1, 2)
    pack = Pack(BOUNDS, angles.cos(), angles.sin())
    rows = torch.tensor([0, 3, 5]) if some_rows else None
    found = []
    for spend in (False, True):
        x = start.clone().requires_grad_()
        y = fused(blocks[0], x, pack, arena := Arena(), again=again)
        z = fused(blocks[1], y, pack, arena, again=again, spend=spend)
        out = fused(blocks[2], z, pack, arena, rows=rows, again=again, spend=spend)
        seen: list[int] = []
        y.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        trained = [t for block in blocks for t in block.parameters() if t.requires_grad]
        found.append(torch.autograd.grad(out.square().sum(), [x, *trained]))
        assert (seen == [y.data_ptr()]) == spend
        assert arena.kept == 0
        assert torch.equal(x, start)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
