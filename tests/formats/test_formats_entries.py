"""What a checkpoint holds of a quantised weight: it comes back bit for bit, and what is damaged is said."""

from __future__ import annotations

import json
import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from deltaw.errors import BaseError
from deltaw.formats import QUANTISED
from deltaw.formats.int4 import Int4Weight
from deltaw.formats.nf4 import NF4Weight

STATE = "weight.quant_state.bitsandbytes__nf4"


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def entries() -> dict[str, Tensor]:
    """Of an NF4 weight [7, 37] with double quantisation: 5 blocks, an odd number of values."""
    return NF4Weight.quantised(noise(7, 37), double_quant=True).entries()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", [32, 256])
@pytest.mark.parametrize("name", oracle.NAMES)
def test_a_weight_comes_back_bit_for_bit(name, block, double, dtype):
    kind = QUANTISED[name]
    weight = kind.quantised(noise(67, 129), dtype, block, double)
    entries = weight.entries()
    again = kind.from_entries(entries)
    assert (again.dtype, again.block, again.double_quant) == (dtype, block, double)
    assert (again.out_features, again.in_features) == (67, 129)
    assert torch.equal(again.dense(), weight.dense())
    back = again.entries()
    assert list(back) == list(entries)
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in entries.items())
    assert kind.from_entries(entries, torch.float16).dtype == torch.float16


@pytest.mark.parametrize(("name", "tool"), [("nf4", "bitsandbytes"), ("fp4", "bitsandbytes"), ("int4", "deltaw")])
def test_keys_and_state_are_those_of_the_format(name, tool):
    found = QUANTISED[name].quantised(noise(7, 37), torch.bfloat16, 128, True).entries()
    key = f"weight.quant_state.{tool}__{name}"
    parts = {"weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", key}
    assert set(found) == parts
    state = json.loads(bytes(found[key].tolist()))
    offset = state.pop("nested_offset")
    assert state == {
        "quant_type": name, "blocksize": 128, "dtype": "bfloat16", "shape": [7, 37], "nested_blocksize": 256,
        "nested_dtype": "float32",
    }  # fmt: skip
    assert offset == float(oracle.absmax_of(noise(7, 37), 128).mean())
    assert found["weight"].shape == (130, 1)
    assert set(QUANTISED[name].quantised(noise(7, 37)).entries()) == parts - {
        "weight.nested_absmax", "weight.nested_quant_map",
    }  # fmt: skip


def test_a_file_that_is_changed_later_does_not_change_the_table(entries):
    entries["weight.quant_map"].zero_()
    entries["weight.nested_quant_map"].zero_()
    assert float(NF4Weight.levels.table.abs().max()) == 1.0
    assert float(NF4Weight.quantised(noise(7, 37), double_quant=True).dense().abs().max()) > 1.0


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.uint8])
def test_codes_in_other_storage_dtypes_are_read(entries, stored):
    codes = torch.cat([entries["weight"].view(-1)]).view(stored)
    again = NF4Weight.from_entries({**entries, "weight": codes.view(-1, 1)})
    assert torch.equal(again.dense(), NF4Weight.from_entries(entries).dense())
    assert again.codes.dtype == torch.uint8


def with_state(entries: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    """The entries with keys of the state changed; None takes one out."""
    state = json.loads(bytes(entries[STATE].tolist())) | changes
    return with_json(entries, json.dumps({k: v for k, v in state.items() if v is not None}).encode())


def with_json(entries: dict[str, Tensor], text: bytes) -> dict[str, Tensor]:
    return {**entries, STATE: torch.tensor(list(text), dtype=torch.uint8)}


STATES = [
    ({"shape": [7]}, "lacks or garbles"),
    ({"shape": [7, 37, 1]}, "lacks or garbles"),
    ({"shape": None}, "lacks or garbles 'shape'"),
    ({"shape": "7x37"}, "lacks or garbles"),
    ({"shape": [math.inf, 37]}, "lacks or garbles"),
    ({"shape": [-7, -37]}, r"an impossible shape: \[-7, -37\]"),
    ({"shape": [0, 37]}, "an impossible shape"),
    ({"shape": [37, 9]}, r"weight holds 130 values of torch.uint8, not 167"),
    ({"dtype": None}, "lacks or garbles 'dtype'"),
    ({"dtype": "int8"}, "lacks or garbles 'int8'"),
    ({"dtype": ["float32"]}, "lacks or garbles"),
    ({"blocksize": None}, "lacks or garbles 'blocksize'"),
    ({"blocksize": 48}, "a block of 48 values is not possible"),
    ({"blocksize": "64"}, "a block of '64' values is not possible"),
    ({"blocksize": 128}, "weight.absmax holds 5 values of torch.uint8, not 3"),
    ({"quant_type": "fp4"}, "says 'fp4' under the key of 'nf4'"),
    ({"quant_type": None}, "says None under the key of 'nf4'"),
    ({"nested_blocksize": 128}, "no offset or other nested blocks than 256"),
    ({"nested_offset": None}, "no offset or other nested blocks than 256"),
    ({"nested_offset": "2.0"}, "no offset or other nested blocks than 256"),
    ({"nested_offset": 10**400}, "no offset or other nested blocks than 256"),
    ({"nested_offset": math.nan}, "constants hold NaN or infinity"),
]


@pytest.mark.parametrize(("changes", "said"), STATES, ids=str)
def test_a_damaged_state_is_refused(entries, changes, said):
    with pytest.raises(BaseError, match=said):
        NF4Weight.from_entries(with_state(entries, **changes))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe", b'{"a": 1', b"[" * 100_000], ids=lambda t: str(t[:5]))
def test_a_state_that_is_no_json_is_refused(entries, text):
    with pytest.raises(BaseError, match=f"its {STATE} is not JSON"):
        NF4Weight.from_entries(with_json(entries, text))


@pytest.mark.parametrize("text", [b"[1]", b"null", b"7"])
def test_a_state_that_is_no_object_is_refused(entries, text):
    with pytest.raises(BaseError, match=r"holds a JSON .*, not an object"):
        NF4Weight.from_entries(with_json(entries, text))


def test_a_state_that_is_no_bytes_is_refused(entries):
    for value in (torch.tensor(1.5), torch.ones(3), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(BaseError, match="is not JSON"):
            NF4Weight.from_entries({**entries, STATE: value})


@pytest.mark.parametrize(
    "key", ["weight", "weight.absmax", "weight.quant_map", "weight.nested_quant_map", STATE], ids=str
)
def test_a_missing_part_is_refused_by_name(entries, key):
    del entries[key]
    with pytest.raises(BaseError, match=key):
        NF4Weight.from_entries(entries)


def test_absmax_without_its_own_scales_is_refused(entries):
    del entries["weight.nested_absmax"]
    with pytest.raises(BaseError, match=r"weight.absmax holds 5 values of torch.uint8, not 5 of torch.float32"):
        NF4Weight.from_entries(entries)


DAMAGED = {
    "truncated codes": ("weight", lambda t: t[:-1], "weight holds 129 values of torch.uint8, not 130"),
    "too many codes": ("weight", lambda t: torch.cat([t, t]), "weight holds 260 values"),
    "no codes": ("weight", lambda t: torch.tensor(1.0), "weight holds 4 values"),
    "wide scales": ("weight.absmax", lambda t: t.float(), "holds 5 values of torch.float32, not 5 of torch.uint8"),
    "NaN": ("weight.nested_absmax", lambda t: t * math.nan, "constants hold NaN or infinity"),
    "infinity": ("weight.nested_absmax", lambda t: t * math.inf, "constants hold NaN or infinity"),
    "another table": ("weight.quant_map", lambda t: t * 1.01, "quant_map is missing or holds other levels"),
    "a table of one": ("weight.quant_map", lambda t: t[:1], "quant_map is missing or holds other levels"),
    "a table of NaN": ("weight.quant_map", lambda t: t * math.nan, "quant_map is missing or holds other levels"),
    "another nested table": ("weight.nested_quant_map", lambda t: t.flip(0), "nested_quant_map is missing or holds"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_tensors_are_refused(entries, what):
    key, change, said = DAMAGED[what]
    with pytest.raises(BaseError, match=said):
        NF4Weight.from_entries({**entries, key: change(entries[key])})


def test_nan_in_plain_scales_is_refused():
    entries = NF4Weight.quantised(noise(7, 37)).entries()
    entries["weight.absmax"][3] = math.nan
    with pytest.raises(BaseError, match="constants hold NaN or infinity"):
        NF4Weight.from_entries(entries)


def test_another_formats_entries_are_refused_with_the_near_key(entries):
    with pytest.raises(BaseError, match=r"it has no weight.quant_state.bitsandbytes__fp4\. Did you mean '.*__nf4'"):
        QUANTISED["fp4"].from_entries(entries)
    with pytest.raises(BaseError, match=r"it has no weight.quant_state.deltaw__int4"):
        Int4Weight.from_entries(entries)
