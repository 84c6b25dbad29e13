"""A quantised folder: which base it is, that nobody changed it, and what other tools' folders are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltaw.core.fingerprint import SOURCE_FILE, fingerprint_folder
from deltaw.errors import BaseError, RunError
from deltaw.merge.quantise import quantise_base
from deltaw.model.base import load_base
from deltaw.model.describe import describe_base
from deltaw.model.load import load_transformers
from deltaw.model.quantised import Format, frozen_weights

IDS = torch.randint(3, 260, (2, 9), generator=torch.Generator().manual_seed(5))
NF4 = Format("nf4", 64, True)


@pytest.fixture
def folder(base, tmp_path) -> Path:
    """`base` in nf4 with double quantisation, as deltaw writes it."""
    quantise_base(base, tmp_path / "quantised", NF4)
    return tmp_path / "quantised"


FORMATS = [NF4, Format("fp4", 32), Format("int4", 128, True), Format("int8", 64)]


@pytest.mark.parametrize("how", FORMATS, ids=str)
@pytest.mark.parametrize("shards", [10**9, 10_000], ids=["one", "shards"])
def test_a_written_folder_loads_as_what_was_quantised(base, tmp_path, how, shards):
    report = quantise_base(base, tmp_path / "out", how, shard_bytes=shards)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards == 10_000)
    saved, made = (
        load_base(tmp_path / "out"),
        load_base(base, format=how.name, block=how.block, double_quant=how.double_quant),
    )
    for name, weight in frozen_weights(made.net).items():
        again = frozen_weights(saved.net)[name]
        assert type(again) is type(weight)
        assert (again.block, again.double_quant) == (how.block, how.double_quant)
        assert all(torch.equal(t, dict(weight.named_buffers())[k]) for k, t in again.named_buffers())
    assert torch.equal(saved.logits(IDS), made.logits(IDS))
    assert saved.fingerprint == made.fingerprint
    assert (saved.fingerprint.format, report.format) == (str(how), str(how))
    assert report.n_quantised == len(frozen_weights(made.net)) == 14
    assert report.quantised_bytes == sum(w.nbytes() for w in frozen_weights(made.net).values())
    assert report.dense_bytes == sum(p.numel() * 4 for p in made.net.parameters())
    assert report.size_bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert saved.tokenizer.get_vocab() == made.tokenizer.get_vocab()


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_is_quantised_as_its_converted_folder_is(make, tmp_path, tied):
    path = make.gguf(tmp_path / "tiny.gguf", make.llama(tie_word_embeddings=tied))
    quantise_base(path, tmp_path / "out", NF4)
    made, dense = load_base(tmp_path / "out"), load_base(path)
    assert made.fingerprint == dense.fingerprint.model_copy(update={"format": "nf4+dq"})
    assert torch.equal(made.logits(IDS), load_base(path, format="nf4", double_quant=True).logits(IDS))


def test_a_tie_stays_a_tie_and_is_written_once(make, tmp_path):
    for tied in (True, False):
        base = make.save(tmp_path / f"tied-{tied}", make.llama(tie_word_embeddings=tied))
        quantise_base(base, tmp_path / f"out-{tied}", NF4)
        assert ("lm_head.weight" in load_file(tmp_path / f"out-{tied}" / "model.safetensors")) != tied
        net = load_base(tmp_path / f"out-{tied}").net
        assert (net.lm_head.weight is net.model.embed_tokens.weight) == tied


def test_it_is_the_dense_base_by_every_hash(base, folder):
    dense, mine = fingerprint_folder(base), fingerprint_folder(folder)
    assert mine == dense.model_copy(update={"format": "nf4+dq"})
    assert dense.differences(mine) == {"format": ("dense", "nf4+dq")}
    assert fingerprint_folder(folder, checked=False).weights != dense.weights


def test_a_copy_or_a_link_elsewhere_is_the_same_base(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "far" / "away")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "files").mkdir()
    for path in folder.iterdir():  # as the hub's cache does it
        (tmp_path / "files" / path.name).symlink_to(path)
    wanted = load_base(folder)
    for other in (tmp_path / "far" / "away", tmp_path / "link", tmp_path / "files"):
        model = load_base(other)
        assert model.fingerprint == wanted.fingerprint
        assert torch.equal(model.logits(IDS), wanted.logits(IDS))


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_changed_byte_is_refused(folder, where):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    at = {"first": start, "middle": (start + len(data)) // 2, "last": len(data) - 1}[where]
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(BaseError, match=r"was changed after it was quantised: its tensors hash to [0-9a-f]{12}"):
        fingerprint_folder(folder)
    with pytest.raises(BaseError):
        load_base(folder)


def test_a_damaged_note_of_the_source_is_refused(folder):
    note = json.loads((folder / SOURCE_FILE).read_text())
    for changed in (
        {**note, "fingerprint": {"name": "x"}},
        {**note, "fingerprint": None},
        {**note, "sha256": "0" * 64},
    ):
        (folder / SOURCE_FILE).write_text(json.dumps(changed))
        with pytest.raises(BaseError, match=r"holds no fingerprint|was changed after it was quantised"):
            fingerprint_folder(folder)
    (folder / SOURCE_FILE).write_text("{")
    with pytest.raises(BaseError, match="is not valid JSON"):
        fingerprint_folder(folder)


def test_without_the_note_it_is_a_base_of_its_own(base, folder):
    (folder / SOURCE_FILE).unlink()
    own = fingerprint_folder(folder)
    assert own.format == "nf4"
    assert own.weights != fingerprint_folder(base).weights


def test_a_quantised_folder_cannot_become_another_format(base, folder, tmp_path):
    for settings, asked in (({"format": "int8"}, "int8"), ({"format": "nf4", "block": 128}, "nf4-128")):
        with pytest.raises(BaseError, match=rf"holds nf4\+dq weights: they cannot become {asked}\."):
            load_base(folder, **settings)
    quantise_base(base, tmp_path / "plain", Format("nf4", 128))
    with pytest.raises(BaseError, match=r"holds nf4-128 weights: they cannot become nf4\+dq\."):
        load_base(tmp_path / "plain", format="nf4", double_quant=True)
    wanted = load_base(folder)
    assert torch.equal(load_base(folder, format="nf4").logits(IDS), wanted.logits(IDS))  # what it is already
    assert load_base(tmp_path / "plain", format="nf4").fingerprint.format == "nf4-128"


def test_a_quantised_folder_is_not_quantised_again(folder, tmp_path):
    for how in (NF4, Format("int8")):
        with pytest.raises(
            BaseError, match=r"is quantised already \(nf4\+dq\).\n  Give the model that it was made from"
        ):
            quantise_base(folder, tmp_path / "again", how)
    assert not (tmp_path / "again").exists()


def test_out_must_be_new_or_empty(base, folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for out in (folder, base, base / "model.safetensors"):
        with pytest.raises(RunError, match="Choose another --out, or empty it"):
            quantise_base(base, out, NF4)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert quantise_base(base, tmp_path / "empty", NF4).n_quantised == 14


# Other tools -----------------------------------------------------------------------------------------


def declare(folder: Path, found: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
    return folder


OTHERS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "bitsandbytes 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "unknown": {"bits": 4},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("format", ["dense", "nf4"])
def test_other_tools_quantised_folders_are_refused_by_name(base, name, format):
    declare(base, OTHERS[name])
    with pytest.raises(
        BaseError, match=rf"quantised already, by {name}, which deltaw does not read.*\n  Give the 16- or 32-bit"
    ):
        load_base(base, format=format)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("gptq", "quantised already, by gptq"),
        ({"quant_method": "deltaw", "name": "nf5"}, "unknown format 'nf5'"),
        ({"quant_method": "deltaw"}, "unknown format 'None'"),
        ({"quant_method": "deltaw", "name": "int4", "block": 48}, "a block of 48 values"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": ["nf4"]}, "unknown format"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf3"}, "unknown format 'nf3'"),
        ({"quant_method": "deltaw", "name": "int4"}, "none of its tensors is quantised, whatever its config.json says"),
    ],
    ids=str,
)
def test_a_config_that_says_nonsense_is_refused(base, found, said):
    with pytest.raises(BaseError, match=said):
        load_transformers(declare(base, found), "float32")


def test_codes_of_another_format_than_the_config_says_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    declare(folder, {**config, "bnb_4bit_quant_type": "fp4"})
    with pytest.raises(BaseError, match=r"model.layers.0.\S+.weight: holds nf4 codes, config.json says fp4"):
        load_transformers(folder, "float32")


@pytest.mark.parametrize("part", ["absmax", "quant_map", "nested_absmax", "quant_state.bitsandbytes__nf4"])
def test_a_matrix_with_a_missing_part_is_refused_by_name(folder, part):
    path = folder / "model.safetensors"
    state = load_file(path)
    del state[f"model.layers.1.mlp.up_proj.weight.{part}"]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: "):
        load_transformers(folder, "float32")


def test_a_whole_matrix_that_is_missing_is_refused_by_name(folder):
    path = folder / "model.safetensors"
    state = {k: t for k, t in load_file(path).items() if not k.startswith("model.layers.1.mlp.up_proj.weight")}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(BaseError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_transformers(folder, "float32")


def test_codes_of_another_size_than_the_config_asks_for_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 41}))
    with pytest.raises(
        BaseError, match=r"mlp.\w+_proj.weight: holds a matrix of \[.*40.*\], the config asks for \[.*41"
    ):
        load_transformers(folder, "float32")


def test_describe_says_the_format(base, folder):
    dense, mine = describe_base(base), describe_base(folder)
    assert (dense["format"], mine["format"]) == ("dense", "nf4+dq")
    assert mine["fingerprint"]["weights"] == dense["fingerprint"]["weights"]
    assert (dense["unsupported"], mine["unsupported"]) == (None, None)
    for key in ("name", "n_parameters", "dtype", "sizes", "linear_maps", "tied", "architecture"):
        assert mine[key] == dense[key], key
    assert mine["size_mb"] < dense["size_mb"]


def test_describe_counts_parameters_not_codes_and_says_what_cannot_be_read(base, folder):
    (folder / SOURCE_FILE).unlink()  # as bitsandbytes leaves a folder
    assert describe_base(folder)["n_parameters"] == describe_base(base)["n_parameters"]
    declare(base, OTHERS["gptq"])
    found = describe_base(base)
    assert found["format"] == "gptq"
    assert "quantised already, by gptq, which deltaw does not read" in found["unsupported"]
