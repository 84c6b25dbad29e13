"""Products as thin as a rank: the compiled form against float32 on the same bfloat16 values."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ShapeError
from deltaw.ops.native import thin_calls
from deltaw.ops.native.library import forced, paths
from deltaw.ops.thin import THIN, thin_back

SIZES = [
    (1, 16, 2),
    (7, 18, 3),
    (64, 576, 16),
    (300, 30, 48),
    (513, 100, 17),
    (256, 1536, 16),
    (70, 34, THIN),
    (70, 34, THIN + 1),
]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def strided(rows: int, cols: int) -> torch.Tensor:
    return drawn(rows, cols + 6)[:, 3 : 3 + cols]


@pytest.mark.parametrize("path", [p for p in paths() if p != "scalar"])
@pytest.mark.parametrize(("n", "cols", "rank"), SIZES)
def test_ops_thin_back(path: str, n: int, cols: int, rank: int) -> None:
    torch.manual_seed(0)
    g, u, factor = strided(n, cols), strided(n, rank), drawn(rank, cols).T
    out = torch.full((n, rank + 2), 7.0).bfloat16()
    with forced(path):
        sums = thin_back(g, factor, u, scale=0.7, out=out[:, 1:-1])
        alone = thin_back(g, None, u)
    h, wanted = 0.7 * (g.float() @ factor.float()), u.float().T @ g.float()
    torch.testing.assert_close(out[:, 1:-1].float(), h, rtol=1e-2, atol=1e-2 * float(h.abs().max()))
    assert bool((out[:, 0] == 7).all())
    assert bool((out[:, -1] == 7).all())
    assert sums is not None
    assert alone is not None
    near = 2e-6 if path in ("avx512_bf16", "amx") and rank <= THIN else 1e-2  # sums in float32, or a product of PyTorch
    for found in (sums, alone):
        torch.testing.assert_close(found, wanted, rtol=0, atol=near * n**0.5 * float(wanted.abs().max()))


def test_ops_thin_sums_do_not_depend_on_the_threads() -> None:
    torch.manual_seed(0)
    g, u = drawn(1000, 96), drawn(1000, 16)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(thin_back(g, None, u))
    finally:
        torch.set_num_threads(threads)
    if thin_calls.available():
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
    assert thin_back(g[:0], None, u[:0]).abs().max() == 0


def test_ops_thin_refuses_what_it_could_not_read() -> None:
    g, u, factor = drawn(4, 6), drawn(4, 2), drawn(6, 2)
    for wrong in (g.float(), g[:, ::2], g[:3]):
        with pytest.raises(ShapeError, match="The kernel needs"):
            thin_calls.back(wrong, None, u, 1.0, None)
    with pytest.raises(ShapeError, match="the factor is"):
        thin_calls.back(g, factor[:5], u, 1.0, u)
    with pytest.raises(ShapeError, match="nothing to fill"):
        thin_calls.back(g, factor, None, 1.0, None)
