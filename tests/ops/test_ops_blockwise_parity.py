"""Byte for byte bitsandbytes: its CPU operators on the same matrices. On a GPU, its kernels behind ours."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from made_blocks import LEVELS, blocks_of, made

from deltaw.ops import cuda
from deltaw.ops.blockwise import (
    Blocks,
    Scales,
    dequantise,
    dequantise_reference,
    dynamic_table,
    mul,
    mul_t,
    quantise,
    quantise_dynamic,
    quantise_scales,
)


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes.functional as functional
    return functional


SHAPES = ((40, 24), (33, 65), (16, 256), (5, 1000), (64, 96))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_absmax_are_bitsandbytes(any_path, bnb, kind):
    for block, shape, dtype in itertools.product((32, 64, 512, 4096), SHAPES, (torch.float32, torch.bfloat16)):
        w = made(shape, block, dtype)
        codes, absmax = quantise(w, LEVELS[kind], block)
        its, state = bnb.quantize_4bit(w, blocksize=block, quant_type=kind)
        assert codes.equal(its.view(-1))
        assert absmax.equal(state.absmax)


@pytest.mark.parity
def test_nested_scales_are_bitsandbytes(any_path, bnb):
    w = made((96, 1024), 3)
    _, absmax = quantise(w, LEVELS["nf4"], 64)
    scales = quantise_scales(absmax)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert scales.absmax.equal(state.absmax)
    assert scales.nested.equal(state.state2.absmax)
    assert scales.table.equal(state.state2.code)
    assert scales.offset.equal(state.offset)
    assert scales.plain().equal(bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset)


@pytest.mark.parity
def test_dynamic_codes_are_bitsandbytes(any_path, bnb):
    for n, block in ((1000, 256), (4096, 64)):
        values = made((1, n), n).view(-1)
        codes, absmax = quantise_dynamic(values, dynamic_table(), block)
        its, state = bnb.quantize_blockwise(values, code=dynamic_table(), blocksize=block)
        assert codes.equal(its)
        assert absmax.equal(state.absmax)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_dequantised_values_are_bitsandbytes(any_path, bnb, kind):
    """Its plain form: the C++ one goes wrong where a row is shorter than a block."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    plain = _dequantize_4bit_compute.__wrapped__
    for block, shape, dtype in itertools.product((32, 64, 512), SHAPES, (torch.float32, torch.bfloat16)):
        blocks = blocks_of(made(shape, block), LEVELS[kind], block, False)
        wanted = plain(blocks.codes, blocks.scales.absmax, LEVELS[kind].table, block, shape, dtype)
        assert dequantise(blocks, dtype).equal(wanted)


@pytest.mark.parity
def test_what_the_gpu_form_hands_to_bitsandbytes_gives_our_products(bnb):
    """The same calls on CPU tensors: bitsandbytes' operators take either."""
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    for name, nested in itertools.product(("nf4", "fp4", "int8", "int4"), (False, True)):
        blocks = blocks_of(made((40, 256), 2), LEVELS[name], 64, nested)
        w, bias = dequantise_reference(blocks), made((40,), 1)
        if name == "int4":
            assert cuda.dequantise(blocks, torch.float32) is None
            assert cuda.mul(x, blocks, bias) is None
            continue
        assert cuda.dequantise(blocks, torch.float32).equal(w)
        assert cuda.mul(x, blocks, bias).allclose(F.linear(x, w, bias), rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("nested", [False, True])
def test_products_on_a_gpu_are_the_dense_matrix(name, nested):
    here = blocks_of(made((70, 1024), 2) / 100, LEVELS[name], 64, nested)
    s = here.scales
    moved = [None if t is None else t.cuda() for t in (s.absmax, s.nested, s.table, s.offset)]
    there = Blocks(here.codes.cuda(), Scales(*moved), here.levels, 64, here.shape)
    w = dequantise_reference(here)
    assert dequantise(there).cpu().allclose(w, rtol=1e-6)
    for n in (1, 5, 300):
        x = torch.randn(n, 1024, generator=torch.Generator().manual_seed(n))
        wanted = F.linear(x, w)
        for dtype, room in ((torch.float32, 1e-3), (torch.bfloat16, 2e-2)):
            y = mul(x.to("cuda", dtype), there).cpu().float()
            assert (y - wanted).abs().max() < room * wanted.abs().max()
            back = mul_t(wanted.to("cuda", dtype), there).cpu().float()
            assert (back - wanted @ w).abs().max() < room * (wanted @ w).abs().max()
