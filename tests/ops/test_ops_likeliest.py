"""The likeliest token of each row: torch.max on every path, the first of equal ones, NaN found."""

from __future__ import annotations

import pytest
import torch

from deltaw.errors import ShapeError
from deltaw.ops.likeliest import likeliest
from deltaw.ops.native import library

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1000, 5003])
def test_ops_likeliest_equals_torch_on_every_path(vocab):
    rng = torch.Generator().manual_seed(vocab)
    x = torch.randn(9, vocab, generator=rng)
    x[1] -= 100
    x[2] = -INF
    x[3, vocab // 2 :] = -INF
    x[4, vocab // 3] = INF
    x[5, -1] = x[5, vocab // 2] = 9.0
    x[6, vocab // 2] = NAN
    x[7, 0] = NAN
    x[8] = 2.5
    wanted = x.amax(-1)
    for name in library.paths():
        with library.forced(name):
            values, places = likeliest(x)
        assert torch.equal(values.isnan(), torch.arange(9).eq(6) | torch.arange(9).eq(7))
        for row in range(9):
            same = x[row].isnan() if wanted[row].isnan() else x[row] == wanted[row]
            assert same[int(places[row])]
            assert wanted[row].isnan() or values[row] == wanted[row]
            assert name == library.REFERENCE or int(places[row]) == int(same.nonzero()[0])


def test_ops_likeliest_takes_rows_of_a_wider_buffer():
    x = torch.randn(5, 90, generator=torch.Generator().manual_seed(1))[:, 3:71]
    values, places = likeliest(x)
    assert torch.equal(values, x.amax(-1))
    assert torch.equal(x.gather(1, places[:, None])[:, 0], values)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 0), torch.zeros(2, 5, dtype=torch.bfloat16)])
def test_ops_likeliest_refuses_what_are_no_logits(wrong):
    with pytest.raises(ShapeError):
        likeliest(wrong)
