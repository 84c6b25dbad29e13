"""Matrices in blocks: every path against the reference, and the reference against the definition."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from made_blocks import LEVELS, blocks_of, made
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deltaw.errors import ShapeError
from deltaw.ops import blockwise, native
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
    quantise_dynamic_reference,
    quantise_reference,
    quantise_scales,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1), (3, 5), (40, 24), (33, 65), (16, 256), (5, 1000), (3, 4104))
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of a rounded value


def assert_a_product(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """y is x W^T + bias for W [out, in] rounded to y's dtype or not, summed in float32 in any order."""
    k = x.shape[-1]
    exact = F.linear(x.double(), w.double())
    size = F.linear(x.double().abs(), w.double().abs())
    room = 4 * 2.0**-24 * math.sqrt(k) * size  # a k-term dot product in float32
    if y.dtype != torch.float32:
        room = room + 1.1 * HALF_ULP[y.dtype] * size + 2.0**-24 * k  # W rounded; float16's subnormals
    if bias is not None:
        exact = exact + bias.double()
    room = room + 1.1 * HALF_ULP[y.dtype] * (exact.abs() + room) + 1e-30
    worst = ((y.double() - exact).abs() / room).max().item()
    assert worst <= 1, f"{worst:.2f} times what rounding allows"


# Quantise -------------------------------------------------------------------------------------------------------------


def test_quantise_is_the_reference_byte_for_byte(any_path):
    for (name, levels), block in itertools.product(LEVELS.items(), (32, 64, 256, 4096)):
        for seed, (shape, dtype) in enumerate(itertools.product(SHAPES, DTYPES)):
            w = made(shape, seed, dtype)
            codes, absmax = quantise(w, levels, block)
            wanted, its = quantise_reference(w, levels, block)
            assert codes.equal(wanted), (name, block, shape, dtype)
            assert absmax.equal(its), (name, block, shape, dtype)


@pytest.mark.parametrize("name", LEVELS)
def test_a_value_half_way_takes_the_lower_level(any_path, name):
    levels = LEVELS[name]
    bounds = levels.bounds()
    for size in (1.0, 0.25, 64.0):  # powers of two: scaling is exact
        values = torch.cat([bounds * size, torch.tensor([size])])
        values = F.pad(values, (0, -len(values) % 32))
        codes, _ = quantise(values, levels, 4096 if len(values) > 64 else 32)
        wanted, _ = quantise_reference(values, levels, 4096 if len(values) > 64 else 32)
        assert codes.equal(wanted)


def test_blocks_of_tiny_values_are_the_references(any_path):
    g = torch.Generator().manual_seed(0)
    for size in (1e-30, 1e-37, 1e-39, 1e-44):
        w = torch.randn(200, generator=g) * size
        for levels in LEVELS.values():
            for found, wanted in zip(quantise(w, levels, 64), quantise_reference(w, levels, 64), strict=True):
                assert found.equal(wanted)


def test_quantise_takes_any_layout_and_dtype(any_path):
    w = made((40, 24), 1)
    for view in (w.T, w[:, ::2], w.double(), w.view(4, 10, 24)):
        for found, wanted in zip(
            quantise(view, LEVELS["nf4"], 32), quantise_reference(view, LEVELS["nf4"], 32), strict=True
        ):
            assert found.equal(wanted)


def test_quantise_dynamic_is_the_reference_byte_for_byte(any_path):
    g = torch.Generator().manual_seed(1)
    for n, block in itertools.product((1, 5, 255, 256, 1000, 70_001), (64, 256, 100, 4096)):
        values = torch.randn(n, generator=g) * 1e-3
        values[256:512] = 0
        values[512:600] = 1e-42  # 1 / absmax overflows
        for given in (values, values * 1e-38, values.bfloat16(), values.abs()):
            found = quantise_dynamic(given, dynamic_table(), block)
            wanted = quantise_dynamic_reference(given, dynamic_table(), block)
            assert found[0].equal(wanted[0])
            assert found[1].equal(wanted[1])


# Dequantise -----------------------------------------------------------------------------------------------------------


def test_dequantise_is_the_reference_bit_for_bit(any_path):
    for (name, levels), block, nested in itertools.product(LEVELS.items(), (32, 64, 256, 4096), (False, True)):
        for seed, shape in enumerate(SHAPES):
            blocks = blocks_of(made(shape, seed), levels, block, nested)
            for dtype in (*DTYPES, torch.float64):
                assert dequantise(blocks, dtype).equal(dequantise_reference(blocks, dtype)), (name, block, shape, dtype)


def test_a_matrix_that_no_cache_holds_is_the_reference_bit_for_bit(any_path):
    """Stores go past the caches there; the odd one out never lies on their lines."""
    for shape in ((2100, 4128), (2099, 4101)):
        codes = torch.randint(0, 256, (-(-shape[0] * shape[1] // 2),), generator=torch.Generator().manual_seed(0))
        absmax = torch.rand(-(-shape[0] * shape[1] // 64), generator=torch.Generator().manual_seed(1))
        blocks = Blocks(codes.to(torch.uint8), Scales(absmax), LEVELS["nf4"], 64, shape)
        for dtype in DTYPES:
            assert dequantise(blocks, dtype).equal(dequantise_reference(blocks, dtype))


def test_a_dequantised_matrix_is_not_moved_by_another_round(any_path):
    for levels, block in itertools.product((v for v in LEVELS.values() if v.table.abs().max() == 1), (32, 128)):
        w = dequantise(blocks_of(made((33, 64), 5), levels, block, False))
        codes, absmax = quantise(w, levels, block)
        assert dequantise(Blocks(codes, Scales(absmax), levels, block, (33, 64))).equal(w)


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
def test_products_are_the_dense_matrix(any_path, dtype, nested):
    cases = itertools.product(
        LEVELS.items(), ((40, 24, 32), (33, 65, 64), (70, 1000, 256), (3, 4104, 64), (9, 256, 64))
    )
    for seed, ((_, levels), (out, cols, block)) in enumerate(cases):
        blocks = blocks_of(made((out, cols), seed), levels, block, nested)
        w = dequantise_reference(blocks)
        g = torch.Generator().manual_seed(seed)
        for n in (1, 2, 3, 5, 16, 17, 64, 300):
            x = torch.randn(n, cols, generator=g).to(dtype)
            bias = torch.randn(out, generator=g).to(dtype) if n != 3 else None
            assert_a_product(mul(x, blocks, bias), x, w, bias)
            d = torch.randn(n, out, generator=g).to(dtype)
            assert_a_product(mul_t(d, blocks), d, w.T)


def assert_the_weights_of(y: Tensor, x: Tensor, blocks: Blocks, bias: Tensor | None, back: bool = False) -> None:
    """y is x W^T + bias, or x W, of W dequantised to float32 or to y's dtype, summed in float32 and rounded once."""
    worst, k = [], x.shape[-1]
    for w in (dequantise_reference(blocks).double(), dequantise_reference(blocks, y.dtype).double()):
        w = w.T if back else w
        exact = F.linear(x.double(), w, None if bias is None else bias.double())
        room = 4 * 2.0**-24 * math.sqrt(k) * F.linear(x.double().abs(), w.abs()) + 1.1 * HALF_ULP[y.dtype] * exact.abs()
        worst.append(((y.double() - exact).abs() / (room + 1e-30)).max().item())
    assert min(worst) <= 1, f"{worst} times what rounding allows"


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_many_rows_take_the_weights_that_dequantise_gives(any_path, levels):
    """More rows than wait for their sums at a time, more columns than a task takes, several hundred terms."""
    cases = ((34, 200, 64, 2051), (210, 66, 32, 67), (700, 580, 128, 73), (30, 35, 64, 75), (35, 30, 4096, 75))
    for seed, (out, cols, block, n) in enumerate(cases):
        blocks = blocks_of(made((out, cols), seed), levels, block, bool(seed % 2))
        g = torch.Generator().manual_seed(seed)
        x, d = torch.randn(n, cols, generator=g).bfloat16(), torch.randn(n, out, generator=g).bfloat16()
        bias = torch.randn(out, generator=g).bfloat16() if seed else None
        assert_the_weights_of(mul(x, blocks, bias), x, blocks, bias)
        assert_the_weights_of(mul_t(d, blocks), d, blocks, None, back=True)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
def test_few_rows_take_the_weights_that_dequantise_gives(any_path, block, nested):
    """Rows of whole 64 columns, longer than the columns taken at a time, no multiple of the rows taken at a time."""
    for seed, (name, (out, cols)) in enumerate(itertools.product(LEVELS, ((37, 576), (6, 1600)))):
        blocks = blocks_of(made((out, cols), seed), LEVELS[name], block, nested)
        g = torch.Generator().manual_seed(seed)
        for n, dtype in itertools.product((1, 2, 3, 4, 5, 6, 7, 70), (torch.bfloat16, torch.float32)):
            x, bias = torch.randn(n, cols, generator=g).to(dtype), torch.randn(out, generator=g).to(dtype)
            given = bias if n % 2 else None
            assert_the_weights_of(mul(x, blocks, given), x, blocks, given)


@pytest.mark.parametrize("shape", [(77, 2048), (37, 576), (35, 9024), (18, 22016)], ids=str)
def test_nested_scales_give_the_bytes_of_plain_ones(any_path, shape):
    """Rows whose scales are computed many at a time, over the places where their constant changes, to the very last."""
    for block, n, dtype in itertools.product((64, 128), (1, 2, 4, 6), (torch.bfloat16, torch.float32)):
        nested = blocks_of(made(shape, n), LEVELS["nf4"], block, True)
        plain = dataclasses.replace(nested, scales=Scales(nested.scales.plain()))
        x = torch.randn(n, shape[1], generator=torch.Generator().manual_seed(n)).to(dtype)
        assert mul(x, nested).equal(mul(x, plain))


@pytest.mark.parametrize("block", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_one_row_is_right_for_every_block_size(any_path, block):
    """Blocks run over the ends of rows: 1,000 and 1,016 are no multiples of any."""
    for cols, name, dtype in itertools.product((1000, 1016, 512, 8), ("nf4", "int8"), DTYPES):
        blocks = blocks_of(made((13, cols), block + cols), LEVELS[name], block, True)
        x = torch.randn(1, cols, generator=torch.Generator().manual_seed(cols)).to(dtype)
        assert_a_product(mul(x, blocks), x, dequantise_reference(blocks))


def test_leading_dims_empty_inputs_and_strides(any_path):
    blocks = blocks_of(made((40, 24), 2), LEVELS["nf4"], 32, False)
    w = dequantise(blocks)
    x = torch.randn(2, 3, 5, 24, generator=torch.Generator().manual_seed(0))
    assert mul(x, blocks).shape == (2, 3, 5, 40)
    assert_a_product(mul(x, blocks), x, w)
    assert_a_product(mul(x.transpose(0, 2), blocks), x.transpose(0, 2), w)
    assert_a_product(mul(x[0, 0, 0], blocks), x[0, 0, 0], w)
    assert mul(x[:0], blocks).shape == (0, 3, 5, 40)
    assert mul_t(mul(x, blocks), blocks).shape == x.shape
    with pytest.raises(ShapeError, match="last size of 24"):
        mul(x[..., :23], blocks)
    with pytest.raises(ShapeError, match="last size of 40"):
        mul_t(x, blocks)


def test_a_matrix_larger_than_the_scratch_is_made_dense_in_parts(any_path, monkeypatch):
    monkeypatch.setattr(blockwise, "_SCRATCH_BYTES", 1 << 15)
    monkeypatch.setattr(blockwise, "_FEW_ROWS", 0)
    blocks = blocks_of(made((300, 264), 4), LEVELS["nf4"], 64, True)
    w = dequantise_reference(blocks)
    for dtype, n in itertools.product(DTYPES, (1, 7)):
        x = torch.randn(n, 264, generator=torch.Generator().manual_seed(n)).to(dtype)
        bias = made((300,), 9, dtype)
        assert_a_product(mul(x, blocks, bias), x, w, bias)
        assert_a_product(mul(x, blocks), x, w)
        d = torch.randn(n, 300, generator=torch.Generator().manual_seed(n)).to(dtype)
        assert_a_product(mul_t(d, blocks), d, w.T)


def test_gradients_are_the_dense_products(any_path):
    blocks = blocks_of(made((40, 24), 3) / 100, LEVELS["nf4"], 32, True)
    w = dequantise(blocks)
    g = torch.Generator().manual_seed(5)
    for n in (1, 4, 100):
        x, bias = torch.randn(n, 24, generator=g, requires_grad=True), torch.randn(40, generator=g, requires_grad=True)
        d = torch.randn(n, 40, generator=g)
        found = torch.autograd.grad(mul(x, blocks, bias), (x, bias), d)
        wanted = torch.autograd.grad(F.linear(x, w, bias), (x, bias), d)
        for a, b in zip(found, wanted, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)  # 40-term dot products
        assert torch.autograd.grad(mul_t(d.requires_grad_(), blocks).sum(), d)[0].allclose(w.sum(1).expand(n, 40), 1e-5)


def test_gradcheck_in_float64(any_path):
    blocks = blocks_of(made((7, 24), 3) / 100, LEVELS["int4"], 32, False)
    g = torch.Generator().manual_seed(5)
    x = torch.randn(3, 24, generator=g, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: mul(x, blocks, b), (x, bias))
    assert torch.autograd.gradgradcheck(lambda x, b: mul(x, blocks, b), (x, bias))


def test_threads_change_nothing():
    """Every output is the work of one thread, in one order."""
    blocks = blocks_of(made((900, 1000), 6), LEVELS["nf4"], 64, True)
    even = blocks_of(made((900, 1024), 7), LEVELS["nf4"], 64, True)
    x = torch.randn(80, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            dense = dequantise(blocks, torch.bfloat16)
            products = [mul(x[:n, : b.shape[1]], b) for n in (1, 3, 17, 80) for b in (blocks, even)]
            found.append((dense, *products, *quantise(dense, blocks.levels, 64)))
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# Without memory -------------------------------------------------------------------------------------------------------


class LargestMade(TorchDispatchMode):
    """The most bytes in one tensor that was made inside the block."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, tuple | list) else (result,):
            if isinstance(t, Tensor) and not t._is_view():
                self.largest = max(self.largest, t.numel() * t.element_size())
        return result


def on_meta(blocks: Blocks) -> Blocks:
    s = blocks.scales
    assert s.nested is not None
    assert s.offset is not None
    scales = Scales(s.absmax.to("meta"), s.nested.to("meta"), s.table, s.offset.to("meta"))
    return Blocks(blocks.codes.to("meta"), scales, blocks.levels, blocks.block, blocks.shape)


def test_the_meta_device_gives_shapes_and_the_same_scratch(any_path):
    real = blocks_of(torch.ones(700, 600), LEVELS["nf4"], 64, True)
    meta = on_meta(real)
    assert dequantise(meta, torch.bfloat16).shape == (700, 600)
    for n in (1, 500):
        made_on = {}
        for blocks, device in ((real, "cpu"), (meta, "meta")):
            x, bias = torch.ones(n, 600, device=device).bfloat16(), torch.ones(700, device=device).bfloat16()
            with LargestMade() as seen, torch.no_grad():
                y = mul(x, blocks, bias)
                back = mul_t(y, blocks)
            assert y.shape == (n, 700)
            assert back.shape == (n, 600)
            assert y.dtype == back.dtype == torch.bfloat16
            made_on[device] = seen.largest
        assert made_on["meta"] == pytest.approx(made_on["cpu"], rel=0.1)


def test_the_scratch_does_not_grow_with_the_matrix():
    """Native forms hold a bounded part of W in dense form, and never all its scales."""
    limit, n = blockwise._SCRATCH_BYTES, 300
    if not native.available():
        assert native.paths() == ("reference",)  # nothing to hold to it
        return
    blocks = on_meta(blocks_of(torch.ones(64, 64), LEVELS["nf4"], 64, True))
    for shape in ((5000, 4000), (100_000, 1024)):
        n_values = shape[0] * shape[1]
        scales = Scales(
            torch.empty(n_values // 64, dtype=torch.uint8, device="meta"),
            torch.empty(-(-n_values // 64 // 256), device="meta"),
            dynamic_table(),
            torch.empty((), device="meta"),
        )
        codes = torch.empty(n_values // 2, dtype=torch.uint8, device="meta")
        large = Blocks(codes, scales, blocks.levels, 64, shape)
        x = torch.ones(n, shape[1], device="meta", dtype=torch.bfloat16)
        with LargestMade() as seen, torch.no_grad():
            mul_t(mul(x, large), large)
        assert seen.largest <= max(limit, n * max(shape) * 2)


# Double quantisation --------------------------------------------------------------------------------------------------


def test_nested_scales_are_near_and_counted_in_blocks_of_256(any_path):
    absmax = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5
    scales = quantise_scales(absmax)
    assert scales.nested is not None
    assert scales.absmax.dtype == torch.uint8
    assert len(scales.nested) == 4
    assert (scales.plain() - absmax).abs().max() < 0.02 * (absmax - absmax.mean()).abs().max() + 1e-3
