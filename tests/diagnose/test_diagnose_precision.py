"""What rounding leaves of an update, where that is known."""

from __future__ import annotations

import pytest
import torch

from deltaw.diagnose.precision import Rounded, rounded, rounding
from deltaw.errors import BadInput


def weights(n: int = 40, m: int = 64) -> torch.Tensor:
    """Values that bfloat16 holds, between 1 and 2: neighbours are 2^-7 apart."""
    rng = torch.Generator().manual_seed(2)
    return 1 + torch.randint(0, 128, (n, m), generator=rng) / 128


def test_diagnose_precision_swallows_what_is_below_half_a_step():
    w = weights()
    found = rounded(w, w + 0.4 / 128, rounding("bfloat16"))
    assert (found.kept, found.error, found.lost) == (0.0, pytest.approx(1.0), 1.0)
    assert found.n_changed == w.numel()


def test_diagnose_precision_keeps_whole_steps_and_float32():
    w = weights()
    assert rounded(w, w + 3 / 128, rounding("bfloat16")).error < 0.05
    tiny = rounded(w, w + 1e-4, rounding("float32"))
    assert (tiny.error, tiny.lost) == (0.0, 0.0)
    rounds_up = rounded(w, w + 0.75 / 128, rounding("bfloat16"))
    assert rounds_up.kept == pytest.approx(4 / 3, rel=0.02)
    assert rounds_up.error == pytest.approx(1 / 9, rel=0.05)


def test_diagnose_precision_four_bits_are_coarser_than_eight():
    rng = torch.Generator().manual_seed(0)
    w = torch.randn(40, 64, generator=rng)
    update = 0.005 * torch.randn(40, 64, generator=rng)
    errors = [rounded(w, w + update, rounding(f)).error for f in ("float16", "bfloat16", "int8", "nf4")]
    assert errors == sorted(errors)
    assert errors[1] < 0.5 < 5 < errors[3]


def test_diagnose_precision_sums_and_refuses():
    both = Rounded(10, 5, 4.0, 2.0, 1.0) + Rounded(10, 0, 4.0, 4.0, 0.0)
    assert (both.kept, both.error, both.lost) == (0.75, 0.125, 0.25)
    assert (Rounded().kept, Rounded().error, Rounded().lost) == (1.0, 0.0, 0.0)
    with pytest.raises(BadInput, match="Did you mean 'bfloat16'"):
        rounding("bfloat61")
