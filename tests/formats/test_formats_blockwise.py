"""A quantised weight is the nearest one, its products are those of its dense form, and its bytes are as planned."""

from __future__ import annotations

import copy
import json
import math
import pickle

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deltaw.errors import BaseError, ShapeError
from deltaw.formats import BLOCKS, FORMATS, QUANTISED, BlockwiseWeight

SHAPE = (67, 129)  # 8643 values: odd, rows that end inside a block, a short last block for every size
HOW = [(name, block, double) for name in oracle.NAMES for block in BLOCKS for double in (False, True)]
FEW = [("nf4", 64, True), ("fp4", 32, False), ("int4", 128, True), ("int8", 4096, False)]


def noise(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(shape: tuple[int, int] = SHAPE) -> Tensor:
    """Blocks of very different sizes: one of zeros, one with an outlier."""
    w = noise(*shape) * torch.linspace(0.01, 3, shape[0])[:, None]
    flat = w.view(-1)
    flat[: min(64, len(flat) // 3)] = 0
    flat[-1] = 11.0
    return w


def make(name: str, block: int = 64, double_quant: bool = False, w: Tensor | None = None) -> BlockwiseWeight:
    return QUANTISED[name].quantised(matrix() if w is None else w, block=block, double_quant=double_quant)


def scales_in(entries: dict[str, Tensor]) -> Tensor:
    """The scale of each block, from what is stored."""
    absmax = entries["weight.absmax"]
    if absmax.dtype == torch.float32:
        return absmax
    state = next(json.loads(bytes(t.tolist())) for k, t in entries.items() if "quant_state" in k)
    each = entries["weight.nested_absmax"].repeat_interleave(256)[: len(absmax)]
    return oracle.dynamic_levels().float()[absmax.long()] * each + state["nested_offset"]


@pytest.mark.parametrize(("name", "block", "double"), HOW)
def test_dense_is_the_nearest_level_of_every_value(name, block, double):
    w = matrix()
    weight = make(name, block, double, w)
    wanted = oracle.nearest(w, name, block, scales_in(weight.entries()))
    # the dynamic table and the products are float32: two roundings
    torch.testing.assert_close(weight.dense(), wanted, rtol=0 if not double else 3e-7, atol=1e-6 if double else 0)
    assert weight.dense().shape == SHAPE
    assert weight.dense(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(weight.dense(torch.bfloat16), weight.dense().bfloat16())


@pytest.mark.parametrize(("name", "block", "double"), HOW)
def test_no_value_is_further_off_than_half_a_gap_of_its_block(name, block, double):
    w = matrix()
    absmax = oracle.absmax_of(w, block)
    off = (make(name, block, double, w).dense() - w).abs().reshape(-1)
    # double quantisation moves a scale by half a gap of the dynamic map (0.00703 of the largest deviation) or a cell
    moved = (0.0071 * (absmax - absmax.mean()).abs().max() if double else 0.0) + 1e-6 * absmax
    bound = (oracle.worst_gap(name) * absmax + moved).repeat_interleave(block)[: off.numel()]
    assert bool((off <= bound).all())


@pytest.mark.parametrize("block", BLOCKS)
def test_scales_are_each_blocks_largest_magnitude(block):
    w = matrix()
    plain, double = make("nf4", block, False, w).entries(), make("nf4", block, True, w).entries()
    absmax = oracle.absmax_of(w, block)
    wanted = absmax.clone()
    wanted[-1:] = wanted[-1:].clamp(min=1e-38)
    assert torch.equal(plain["weight.absmax"], wanted)
    levels, kept = oracle.dynamic_levels(), scales_in(double).double()
    off = (absmax - absmax.mean()).double()
    largest = torch.cat([part.abs().max().expand(len(part)) for part in off.split(256)])
    best = ((off / largest)[:, None] - levels).abs().amin(1) * largest
    # bitsandbytes looks codes up in 65,536 cells over [-1, 1]: one cell off the nearest level
    assert bool(((kept - absmax).abs() <= best + largest * 2 / 65535 + 1e-6).all())
    assert double["weight.absmax"].dtype == torch.uint8
    assert torch.equal(double["weight"], plain["weight"])


def test_more_than_256_blocks_have_nested_scales_of_their_own():
    w = noise(130, 133) * torch.linspace(1, 50, 130)[:, None]  # 541 blocks of 32
    weight = make("nf4", 32, True, w)
    entries = weight.entries()
    absmax = oracle.absmax_of(w, 32)
    offset = absmax.mean()
    wanted = torch.stack([(part - offset).abs().max() for part in absmax.split(256)])
    torch.testing.assert_close(entries["weight.nested_absmax"], wanted, rtol=1e-6, atol=0)
    assert len(wanted) == 3
    torch.testing.assert_close(weight.dense(), oracle.nearest(w, "nf4", 32, scales_in(entries)), rtol=3e-7, atol=1e-5)


@pytest.mark.parametrize("name", oracle.NAMES)
@pytest.mark.parametrize("double", [False, True])
def test_zeros_stay_zeros(name, double):
    assert torch.equal(make(name, 64, double, torch.zeros(5, 70)).dense(), torch.zeros(5, 70))
    tiny = make(name, 64, double, torch.full((3, 50), 1e-41)).dense()  # below what a float32 can invert
    assert bool(tiny.isfinite().all())
    assert float(tiny.abs().max()) <= 1e-38


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 1), (2, 64), (5, 33), (1, 4097)])
@pytest.mark.parametrize(("name", "block", "double"), FEW)
def test_small_and_odd_matrices(shape, name, block, double):
    w = noise(*shape)
    weight = make(name, block, double, w)
    scales = scales_in(weight.entries())
    torch.testing.assert_close(weight.dense(), oracle.nearest(w, name, block, scales), rtol=3e-7, atol=1e-6)
    assert (weight.out_features, weight.in_features) == shape
    x = noise(2, shape[1], seed=9)
    torch.testing.assert_close(weight.mul(x), x @ weight.dense().T, rtol=1e-5, atol=1e-4)


def test_a_matrix_that_is_not_contiguous_is_read_row_by_row():
    w = matrix((40, 24)).T
    assert not w.is_contiguous()
    assert torch.equal(make("nf4", w=w).dense(), make("nf4", w=w.contiguous()).dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_depend_on_values_not_on_their_dtype(dtype):
    w = matrix().to(dtype)
    mine, exact = make("nf4", 64, True, w), make("nf4", 64, True, w.float())
    assert mine.dtype == dtype
    assert torch.equal(mine.codes, exact.codes)
    assert torch.equal(mine.absmax, exact.absmax)
    assert QUANTISED["nf4"].quantised(w, torch.bfloat16).dtype == torch.bfloat16


# Bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, (24, 40), (1, 1)])
@pytest.mark.parametrize(("name", "block", "double"), HOW)
def test_planned_bytes_are_the_bytes_in_memory_and_in_the_file(name, block, double, shape):
    weight = make(name, block, double, noise(*shape))
    made = QUANTISED[name].empty(*shape, block=block, double_quant=double)
    codes, constants = made.codes.nbytes, made.nbytes() - made.codes.nbytes
    n = shape[0] * shape[1]
    assert codes == math.ceil(n * oracle.BITS[name] / 8)
    assert codes + constants == weight.nbytes()
    entries = weight.entries()
    stored = sum(
        t.numel() * t.element_size()
        for k, t in entries.items()
        if k.endswith(("weight", "weight.absmax", "nested_absmax"))
    )
    assert weight.nbytes() == stored + (4 if double else 0)  # the offset is in the JSON


@pytest.mark.parametrize(("block", "plain", "double"), [(32, 5.0, 4.254), (64, 4.5, 4.127), (128, 4.25, 4.063)])
def test_bits_a_value(block, plain, double):
    n = 512 * 1024
    for name, more in (("nf4", 0), ("fp4", 0), ("int4", 0), ("int8", 4)):
        for double_quant, wanted in ((False, plain), (True, double)):
            bits = 8 * QUANTISED[name].empty(512, 1024, block=block, double_quant=double_quant).nbytes() / n
            assert bits == pytest.approx(wanted + more, abs=6e-4)  # three digits, and one offset for the matrix


def test_the_registry_names_each_format():
    assert list(FORMATS) == ["dense", *oracle.NAMES]
    assert {name: kind.name for name, kind in QUANTISED.items()} == {name: name for name in oracle.NAMES}
    for name, kind in QUANTISED.items():
        table = kind.levels.table.double().unique()
        torch.testing.assert_close(table, oracle.LEVELS[name].unique(), rtol=1e-7, atol=0)


# Products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "block", "double"), FEW)
@pytest.mark.parametrize("rows", [(), (1,), (3, 5), (90,)], ids=str)
def test_products_and_their_gradients_are_those_of_the_dense_matrix(name, block, double, rows):
    weight = make(name, block, double)
    w = weight.dense(torch.float64)
    for dtype, eps in ((torch.float64, 2.3e-16), (torch.float32, 1.2e-7)):
        # two sums of 129 (or 67) products of up to 11 * 3, in another order
        atol = 400 * 33 * eps
        x, g = (
            noise(*rows, SHAPE[1]).to(dtype).requires_grad_(),
            noise(*rows, SHAPE[0], seed=5).to(dtype).requires_grad_(),
        )
        bias = noise(SHAPE[0], seed=6).to(dtype).requires_grad_()
        y, back = weight.mul(x, bias), weight.mul_t(g)
        torch.testing.assert_close(y.double(), F.linear(x.double(), w, bias.double()), rtol=0, atol=atol)
        torch.testing.assert_close(back.double(), g.double() @ w, rtol=0, atol=atol)
        torch.testing.assert_close(weight.mul(x).double(), x.double() @ w.T, rtol=0, atol=atol)
        dy, dback = noise(*y.shape, seed=7).to(dtype), noise(*back.shape, seed=8).to(dtype)
        dx, db = torch.autograd.grad(y, (x, bias), dy)
        (dg,) = torch.autograd.grad(back, g, dback)
        torch.testing.assert_close(dx.double(), dy.double() @ w, rtol=0, atol=atol)
        torch.testing.assert_close(db.double(), dy.double().reshape(-1, SHAPE[0]).sum(0), rtol=0, atol=atol)
        torch.testing.assert_close(dg.double(), dback.double() @ w.T, rtol=0, atol=atol)
        assert {t.dtype for t in (y, back, dx, db, dg)} == {dtype}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [2, 90])
def test_half_precision_products_are_rounded_like_dense_ones(dtype, rows):
    weight = make("nf4", 64, True, noise(*SHAPE))
    x, bias = noise(rows, SHAPE[1]).to(dtype), noise(SHAPE[0], seed=4).to(dtype)
    w = weight.dense(dtype).double()
    y = weight.mul(x, bias)
    assert y.dtype == dtype
    # W is rounded to the dtype or not; the sum of 129 products may be: half an ulp of each and of the result
    atol = torch.finfo(dtype).eps * (x.double().abs() @ w.abs().T + 4)
    assert bool(((y.double() - F.linear(x.double(), w, bias.double())).abs() <= atol).all())
    g = noise(rows, SHAPE[0], seed=5).to(dtype)
    assert bool(
        (
            (weight.mul_t(g).double() - g.double() @ w).abs()
            <= torch.finfo(dtype).eps * (g.double().abs() @ w.abs() + 4)
        ).all()
    )


@pytest.mark.parametrize("name", oracle.NAMES)
def test_columns_are_the_dense_matrixs(name):
    weight = make(name)
    ids = torch.tensor([[0, 128, 5], [5, 64, 1]])
    assert torch.equal(weight.columns(ids), weight.dense().T[ids])


@pytest.mark.parametrize(("name", "block", "double"), FEW)
def test_like_keeps_every_setting(name, block, double):
    weight = QUANTISED[name].quantised(matrix(), torch.bfloat16, block, double)
    other = noise(*SHAPE, seed=8)
    again = weight.like(other)
    assert type(again) is type(weight)
    assert (again.block, again.double_quant, again.dtype) == (block, double, torch.bfloat16)
    assert torch.equal(again.dense(), make(name, block, double, other).dense())
    assert not torch.equal(again.dense(), weight.dense())


def test_nothing_of_a_weight_is_a_parameter_and_its_source_is_not_changed():
    w = matrix()
    before = w.clone()
    weight = make("nf4", 64, True, w)
    weight.mul(noise(2, SHAPE[1]))
    assert list(weight.parameters()) == []
    assert torch.equal(w, before)


# Refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [48, 16, 8192, 0, -64, True, 64.0, "64", None])
def test_other_blocks_are_refused(block):
    with pytest.raises(BaseError, match=r"a block of .* values is not possible.\n  Take one of 32, 64, .*4096\."):
        make("nf4", block)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(bad):
    w = matrix()
    w[66, 127] = bad
    for name in oracle.NAMES:
        with pytest.raises(BaseError, match="a matrix with NaN or infinity cannot be quantised"):
            make(name, w=w)


def test_what_is_no_matrix_of_floats_is_refused():
    for w in (torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(5), torch.zeros(2, 3, 4), torch.ones(3, 4).int()):
        with pytest.raises(BaseError, match=r"a torch.\w+ matrix of shape \[.*\] cannot be quantised"):
            make("nf4", w=w)
    with pytest.raises(BaseError, match=r"values up to 1e\+300 is beyond float32's range"):
        make("nf4", w=torch.full((3, 5), 1e300, dtype=torch.float64))


def test_an_input_of_another_size_is_refused():
    weight = make("nf4")
    for call, size in ((weight.mul, SHAPE[0]), (weight.mul_t, SHAPE[1])):
        with pytest.raises(ShapeError, match=rf"a matrix of \[67, 129\] needs a last size of .*{size}"):
            call(noise(2, size))


@pytest.mark.parametrize(("name", "block", "double"), FEW)
def test_copies_and_moves_take_their_own_memory(name, block, double):
    """The kernels' pointers are kept between products: they must follow what a copy, a move or a change does."""
    weight, x = make(name, block, double), noise(2, SHAPE[1])
    wanted = weight.mul(x)  # the pointers are there
    copies = [copy.deepcopy(weight), pickle.loads(pickle.dumps(weight))]
    moved = copy.deepcopy(weight).share_memory()  # in place
    weight.codes.zero_()
    for other in (*copies, moved):
        assert torch.equal(other.mul(x), wanted)
    zeroed = weight.mul(x)
    assert not torch.equal(zeroed, wanted)
    weight.codes = copies[0].codes
    assert torch.equal(weight.mul(x), wanted)
    weight.codes.data = torch.zeros_like(weight.codes)
    assert torch.equal(weight.mul(x), zeroed)
