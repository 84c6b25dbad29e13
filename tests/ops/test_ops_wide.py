"""Products of many rows, summed over terms: the compiled form and PyTorch's against float64, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltaw.core.weight import Weight
from deltaw.errors import ShapeError
from deltaw.formats.dense import DenseWeight
from deltaw.formats.int8 import Int8Weight
from deltaw.formats.nf4 import NF4Weight
from deltaw.ops.arena import Arena
from deltaw.ops.native import library, wide_calls
from deltaw.ops.native.library import forced, paths
from deltaw.ops.wide import Band, Frozen, Term, products, products_reference

PATHS = [p for p in paths() if p != "scalar"]
FORMATS = ("dense", "transposed", "nf4", "nf4 twice", "int8")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16()


def strided(rows: int, cols: int) -> Tensor:
    return drawn(rows, cols + 10)[:, 3 : 3 + cols]


def made(name: str, out: int, cols: int) -> Weight:
    w = drawn(out, cols)
    if name.startswith("nf4"):
        return NF4Weight.quantised(w, block=64, double_quant=name == "nf4 twice")
    if name == "int8":
        return Int8Weight.quantised(w, block=32)
    return DenseWeight(w.T.contiguous(), transposed=True) if name == "transposed" else DenseWeight(w)


def check(bands: list[Band], native: bool) -> None:
    """Fill them, and compare: rounded once by the compiled form, after each term by PyTorch."""
    wanted = products_reference(bands)
    edges = [b.y._base[:, -1].clone() for b in bands if b.y._base is not None]
    products(bands, Arena())
    for band, right in zip(bands, wanted, strict=True):
        size = float(right.abs().max()) + 1e-30
        near = 1.01 * 2.0**-8 * right.abs() + 1e-5 * size if native else 0.03 * size
        assert bool(((band.y.double() - right).abs() <= near).all())
    for band, edge in zip([b for b in bands if b.y._base is not None], edges, strict=True):
        assert torch.equal(band.y._base[:, -1], edge)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("back", [False, True], ids=["forward", "back"])
@pytest.mark.parametrize(
    ("n", "out", "cols", "rank"),
    [
        (1, 2, 34, 2),
        (5, 30, 64, 0),
        (13, 64, 130, 48),
        (100, 66, 4700, 16),
        (29, 2500, 96, 256),
        (12, 40, 96, 300),
        (31, 70, 44, 3),
        (33, 48, 80, 8),
        (530, 40, 2400, 16),
    ],
)
def test_ops_wide_equals_its_sum_in_float64(
    path: str, name: str, back: bool, n: int, out: int, cols: int, rank: int
) -> None:
    torch.manual_seed(0)
    weight = made(name, out, cols)
    terms, wide = (out, cols) if back else (cols, out)
    given = [Term(strided(n, rank), drawn(wide, rank).T, -0.7)] if rank else []
    given.append(Term(strided(n, terms), Frozen(weight, back)))
    with forced(path):
        for bias, onto in ((None, None), (torch.randn(wide), strided(n, wide))):
            native = path in ("avx512_bf16", "amx") and wide_calls.available()
            check([Band(strided(n, wide), given, bias, onto)], native and rank <= wide_calls.LEAD)  # beyond: scaled u


def test_ops_wide_equals_its_sum_for_any_number_of_rows() -> None:
    torch.manual_seed(0)
    weight = made("dense", 70, 66)
    for n in range(1, 28):
        given = [Term(strided(n, 6), drawn(70, 6).T, 0.3), Term(strided(n, 66), Frozen(weight))]
        check([Band(strided(n, 70), given)], wide_calls.available())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["dense", "nf4 twice"])
def test_ops_wide_takes_several_bands_and_several_terms(path: str, name: str) -> None:
    torch.manual_seed(0)
    outs, cols, n = (576, 192, 194), 96, 230
    weights = [made(name, out, cols) for out in outs]
    x, u = strided(n, cols), strided(n, 36)
    native = path in ("avx512_bf16", "amx") and wide_calls.available()
    with forced(path):
        whole = strided(n, sum(outs)).split(outs, 1)
        ranks, bands, at = (16, 12, 8), [], 0
        for y, w, r in zip(whole, weights, ranks, strict=True):
            bands.append(Band(y, [Term(u[:, at : at + r], drawn(w.out_features, r).T, 1.7), Term(x, Frozen(w))]))
            at += r
        check(bands, native)
        grads = strided(n, sum(outs)).split(outs, 1)  # side by side: one run of terms
        apart = [strided(n, out) for out in outs]
        for parts in (grads, apart, (*grads[:2], apart[2])):
            terms = [Term(g, Frozen(w, back=True)) for g, w in zip(parts, weights, strict=True)]
            check([Band(strided(n, cols), [Term(u, drawn(36, cols)), *terms])], native)
            check([Band(strided(n, cols), terms)], native)
        y = strided(n, cols)
        before = y.clone()
        products([Band(y, terms, onto=y)], Arena())
        alone = torch.empty_like(before)
        check([Band(alone, terms, onto=before)], native)
        torch.testing.assert_close(y, alone, rtol=2e-2, atol=0.5)


def test_ops_wide_odd_numbers_of_terms_and_other_dtypes_take_the_plain_products() -> None:
    torch.manual_seed(0)
    for dtype, near in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        x, u = torch.randn(4, 7, dtype=dtype), torch.randn(4, 3, dtype=dtype)
        weight = DenseWeight(torch.randn(5, 7, dtype=dtype))
        band = Band(x.new_empty(4, 5), [Term(u, x.new_ones(3, 5), 1.3), Term(x, Frozen(weight))], x.new_ones(5))
        products([band], Arena())
        torch.testing.assert_close(band.y.double(), products_reference([band])[0], rtol=near, atol=near * 9)


def test_ops_wide_gives_the_same_bits_for_any_number_of_threads() -> None:
    torch.manual_seed(0)
    x, u, weight = drawn(301, 700), drawn(301, 16), DenseWeight(drawn(160, 700))
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            y = torch.empty(301, 160, dtype=torch.bfloat16)
            products([Band(y, [Term(u, drawn(0, 0).new_ones(16, 160), 0.3), Term(x, Frozen(weight))])], Arena())
            found.append(y)
    finally:
        torch.set_num_threads(threads)
    if wide_calls.available():
        assert all(torch.equal(found[0], y) for y in found[1:])
    empty = torch.empty(0, 160, dtype=torch.bfloat16)
    products([Band(empty, [Term(x[:0], Frozen(weight))])], Arena())


def test_ops_wide_calls_refuse_what_they_could_not_read() -> None:
    if not wide_calls.available():
        assert library.running() is None or wide_calls.room(1, [1]) == 0
        return
    x, m, y = drawn(4, 6), drawn(6, 8), drawn(4, 8)
    room = torch.empty(wide_calls.room(4, [8]), dtype=torch.uint8)
    term = wide_calls.Term(x, m)
    bad = [
        (wide_calls.Band(y, [wide_calls.Term(x.float(), m)]), "x is"),
        (wide_calls.Band(y, [wide_calls.Term(x[:3], m)]), "x is"),
        (wide_calls.Band(y, [wide_calls.Term(x, m[:4])]), "a factor is"),
        (wide_calls.Band(y, [wide_calls.Term(x, m.float())]), "a factor is"),
        (wide_calls.Band(y, [wide_calls.Term(drawn(4, 8)[:, ::2][:, :4], drawn(4, 8))]), "x is"),
        (wide_calls.Band(y, [wide_calls.Term(x[:, :5], m[:5])]), "an even number"),
        (wide_calls.Band(y, [wide_calls.Term(x, m, 2.0)]), "unscaled"),
        (wide_calls.Band(y, [term, wide_calls.Term(x, m, 2.0)]), "unscaled"),
        (wide_calls.Band(y, [term], torch.ones(7)), "bias is"),
        (wide_calls.Band(y, [term], None, y[:3]), "onto is"),
        (wide_calls.Band(y.T.contiguous().T, [term]), "y is"),
    ]
    for band, said in bad:
        with pytest.raises(ShapeError, match=said):
            wide_calls.products([band], room)
    with pytest.raises(ShapeError, match="too few"):
        wide_calls.products([wide_calls.Band(y, [term])], room[:100])
