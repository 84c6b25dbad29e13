"""NF4 and FP4 are bitsandbytes' bytes: codes, scales, tables and the JSON beside them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from deltaw.formats import QUANTISED

pytestmark = pytest.mark.parity

BLOCKS = (32, 64, 128, 1024, 4096)


def theirs(w: Tensor, name: str, block: int, double: bool, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """What bitsandbytes writes for a matrix."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        w, blocksize=block, compress_statistics=double, quant_type=name, quant_storage=storage
    )
    return {"weight": packed} | {f"weight.{k}": t for k, t in state.as_dict(packed=True).items()}


def same(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for key, value in other.items():
        assert mine[key].dtype == value.dtype, key
        assert mine[key].shape == value.shape, key
        if "quant_state" in key:
            assert bytes(mine[key].tolist()) == bytes(value.tolist())
        assert torch.equal(mine[key], value), key


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_entry_is_bitsandbytes_own(name, block, double):
    # odd counts, rows that end inside a block, sizes that differ by decades; 67 * 1031 is 2159 blocks of 32
    for shape in ((67, 1031), (64, 64), (7, 37), (1, 1), (2, 4096)):
        w = noise(*shape, seed=block) * torch.logspace(-3, 1, shape[0])[:, None]
        same(QUANTISED[name].quantised(w, block=block, double_quant=double).entries(), theirs(w, name, block, double))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_half_precision_matrices_too(name, dtype):
    w = noise(33, 257).to(dtype)
    same(QUANTISED[name].quantised(w, double_quant=True).entries(), theirs(w, name, 64, True))


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_zeros_and_values_half_way_between_levels(name):
    levels = QUANTISED[name].levels.table.sort().values.unique()
    half_way = (levels[:-1] + levels[1:]) / 2
    w = torch.zeros(6, 64)
    w[1, : len(levels)] = levels
    w[2, : len(half_way)] = half_way
    w[2, 63] = 1.0
    w[3] = 1e-41
    w[4, 5] = -3e38
    same(QUANTISED[name].quantised(w).entries(), theirs(w, name, 64, False))


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32, torch.uint8])
@pytest.mark.parametrize("double", [False, True])
def test_their_entries_are_read_whatever_dtype_holds_the_codes(storage, double):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    w = noise(24, 40)
    entries = theirs(w, "nf4", 128, double, storage)
    assert entries["weight"].dtype == storage
    packed, state = quantize_4bit(w, blocksize=128, compress_statistics=double, quant_type="nf4", quant_storage=storage)
    mine = QUANTISED["nf4"].from_entries(entries)
    # the scale may be dequantised in another order of one product and one sum
    torch.testing.assert_close(mine.dense(), dequantize_4bit(packed, state), rtol=3e-7, atol=3e-7)
    assert torch.equal(mine.dense(), QUANTISED["nf4"].quantised(w, block=128, double_quant=double).dense())


@pytest.mark.starter
@pytest.mark.parametrize("key", ["model.layers.7.mlp.down_proj.weight", "model.layers.29.self_attn.k_proj.weight"])
def test_real_matrices_too(key, monkeypatch):
    from safetensors import safe_open

    from deltaw.core import fingerprint
    from deltaw.model.starter import fetch_starter

    monkeypatch.setitem(fingerprint._state, "cache", None)  # the user's, whatever folder other tests took
    (path,) = fetch_starter("smollm2-135m-instruct").glob("*.safetensors")
    with safe_open(path, "pt") as file:
        w = file.get_tensor(key)
    for name, block, double in (("nf4", 64, True), ("nf4", 64, False), ("fp4", 128, True)):
        mine = QUANTISED[name].quantised(w, block=block, double_quant=double).entries()
        same(mine, theirs(w, name, block, double))
        assert json.loads(bytes(mine[f"weight.quant_state.bitsandbytes__{name}"].tolist()))["shape"] == list(w.shape)
